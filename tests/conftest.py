"""For all levels. PostgreSQL and programs are started by fork and exec, out of processes that speak gRPC."""

import os

# Before gRPC is loaded: its handlers take threads up again in a child that is about to become another program, and now
# and then that child dies of it (signal 11, "epoll_wait error: Bad file descriptor").
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
