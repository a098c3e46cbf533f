"""The command line `inference-router`, over AsyncClient.

On stdout stands what was asked for, with `--json` as one JSON document and nothing else; on stderr everything said
about it: progress (on a terminal only) and one line for what failed.

    exit code   0  done: every agent answered, the job completed, the server ready
                1  failed, altogether
                2  the command line, or the file it names, makes no request
                3  some agents answered, others failed
              130  Ctrl-C
"""
