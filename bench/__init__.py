"""The benchmark: `make bench`, or `python -m bench --help`. It is no test: it tells what is, and judges nothing.

What it measures is started as a user starts it, every system in processes of its own, and asked by load processes. The
bench knows the wire (`protos`) and `router_client`; the programs it knows only by their command lines, but for the
store of jobs.

    __main__.py     the command line, signals, what is written where
    plan.py         which cases there are and in which order they run (pure)
    runner.py       the run: start the systems, measure case after case, round after round
    systems.py      how each system is started: echo, mock, router, gateway, databases
    postgres.py     a PostgreSQL of the bench's own
    job_rows.py     databases full of jobs
    processes.py    a process of ours: its lines, its CPU, its memory, its end
    measure.py      one measurement: orders to the load processes, what the servers used meanwhile
    load.py         a load process: callers in a closed loop, or calls at a steady rate
    clients.py      the ways to ask: unary, stream, REST
    store_clients.py    and the store of jobs itself, which no command line shows
    orders.py       what bench and load processes tell each other
    workloads.py    what is asked
    echo.py         the bare grpc.aio server that everything is compared with
    figures.py      from latencies to percentiles, medians and ratios (pure)
    results.py      the figures of all cases, compared (pure)
    report.py       tables and JSON (pure)
    chart.py        the picture (pure)
    progress.py     what runs now, how far it is
    surroundings.py machine, versions, revision
"""
