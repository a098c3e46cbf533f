# One image holds every program; the command picks it, as `python -m` takes it:
#
#   docker run inference-router                                   the router
#   docker run inference-router rest_gateway
#   docker run inference-router mock_nn --listen 0.0.0.0:50061
#
# deploy/README.md tells addresses, settings and probes.

FROM python:3.12-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv
COPY requirements.txt /
# Every file has its hash, and none needs a compiler: what has no wheel fails here.
RUN python -m pip --python /opt/venv install --no-cache-dir --require-hashes --only-binary :all: -r /requirements.txt

WORKDIR /app
COPY protos protos
COPY router_client router_client
COPY mock_nn mock_nn
COPY router router
COPY rest_gateway rest_gateway
COPY deploy/healthcheck.py deploy/healthcheck.py
# Compiled here: the user below cannot write. Checked by hash: a layer need not keep the files' times.
RUN python -m compileall -q --invalidation-mode checked-hash . \
    && mkdir /data

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
# The only place where the user below may write; a volume put here takes over the owner.
COPY --from=build --chown=10001:10001 /data /data
WORKDIR /app
# Loopback, the programs' own default, is out of reach from outside a container.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ROUTER_LISTEN=0.0.0.0:50051 \
    ROUTER_METRICS=0.0.0.0:9091 \
    GATEWAY_LISTEN=0.0.0.0:8000 \
    DATABASE_URL=sqlite:////data/jobs.sqlite3
# By number: Kubernetes' runAsNonRoot cannot look up a name.
USER 10001:10001
EXPOSE 8000 9091 50051 50061
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 CMD ["python", "-m", "deploy.healthcheck"]
ENTRYPOINT ["python", "-m"]
CMD ["router"]
