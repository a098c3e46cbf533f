"""Where router and gateway listen unless somebody says otherwise; of the programs' own defaults."""

ROUTER = "127.0.0.1:50051"
GATEWAY = "http://127.0.0.1:8000"
METRICS = "http://127.0.0.1:9091/metrics"
