# The carillon player: a Python service that reads tunes and strikes 37 hammers through a serial line.
# Built on a laptop, run on an ARM board in the belfry with 1 GB of memory and a very long stair.
#
#   docker buildx build --platform linux/arm64 -f carillon.Dockerfile -t carillon:$(git describe) .

FROM --platform=$BUILDPLATFORM python:3.12-slim-bookworm AS wheels

ARG TARGETARCH
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

RUN pip install --no-cache-dir uv==0.4.*
WORKDIR /build
COPY pyproject.toml uv.lock ./

# Wheels for the target are picked here, on the fast machine, without emulation.
RUN case "$TARGETARCH" in \
        arm64) platform=aarch64-unknown-linux-gnu ;; \
        amd64) platform=x86_64-unknown-linux-gnu ;; \
        *) echo "no bell tower runs on $TARGETARCH" >&2; exit 1 ;; \
    esac; \
    uv export --frozen --no-dev --no-emit-project > requirements.txt; \
    uv pip install --python-platform "$platform" --only-binary :all: \
        --target /opt/site --requirement requirements.txt

COPY src/ src/
COPY tunes/ tunes/
RUN PYTHONPATH=src python -m carillon.check tunes/*.abc | tee /build/tunes.report; \
    cp -r src/carillon /opt/site/

# Tests run on every build; a stage that nobody copies from is skipped unless asked for,
# so the last stage takes the report to force it.
FROM python:3.12-slim-bookworm AS tested
COPY --from=wheels /opt/site /opt/site
COPY tests/ /tests/
ENV PYTHONPATH=/opt/site
RUN python -m unittest discover --start-directory /tests --verbose 2> /tmp/report.txt \
    || { cat /tmp/report.txt; exit 1; }

FROM gcr.io/distroless/python3-debian12:nonroot AS belfry

LABEL org.opencontainers.image.description="Strikes the hours and, on market days, a tune" \
      tower.stairs="212"

COPY --from=wheels /opt/site /opt/site
COPY --from=wheels /build/tunes /srv/tunes
COPY --from=tested /tmp/report.txt /srv/

ENV PYTHONPATH=/opt/site \
    PYTHONUNBUFFERED=1 \
    CARILLON_PORT=/dev/ttyAMA0 \
    CARILLON_QUIET=21:30-07:00 \
    TZ=Europe/Amsterdam

# dialout on the board is group 20; distroless has no /etc/group entry for it
USER 65532:20

STOPSIGNAL SIGINT
ENTRYPOINT ["/usr/bin/python3", "-m", "carillon"]
CMD ["--tunes", "/srv/tunes", "--calendar", "/var/lib/carillon/calendar.ics"]
