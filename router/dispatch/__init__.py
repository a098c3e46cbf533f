"""Where batches go: pools of replicas, and the streams to each replica."""
