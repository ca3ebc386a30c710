# The image of Daybook, for charts/daybook: the program, with git and helm, which it starts.
# Daybook builds it like any other service: see "Daybook in a cluster" in docs/kubernetes.md.

FROM docker.io/library/golang:1.26-bookworm AS helm
COPY tools/helm /helm
WORKDIR /helm
RUN CGO_ENABLED=0 go build -trimpath -o /out/usr/local/bin/helm helm.sh/helm/v4/cmd/helm

FROM docker.io/library/rust:1.95-bookworm AS build
COPY . /source
WORKDIR /source
RUN cargo build --release --locked --package daybook \
 && install -D --strip target/release/daybook /out/usr/local/bin/daybook

FROM docker.io/library/debian:bookworm-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates git openssh-client \
 && rm -rf /var/lib/apt/lists/*
COPY --from=helm /out/ /
COPY --from=build /out/ /
# The chart's pods have this user, and a volume of its group at /data.
USER 10001:10001
ENV DAYBOOK_DATA=/data HOME=/tmp
EXPOSE 7070 7071 7080
ENTRYPOINT ["/usr/local/bin/daybook"]
CMD ["--help"]
