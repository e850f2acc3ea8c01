# Images of proxy-server and edge-agent: one static program each, on nothing. proxy-server-redirect is proxy-server with the
# `nft` program and its libraries, for `proxy-server redirect` on hosts of control planes.
#
#   docker build --target proxy-server -t proxy-server .
#
# compiles in BUILDER. `make images` (deploy/images/build.sh) builds the same targets without it: BINARIES=prebuilt takes
# programs that are compiled already from a context that has them as <architecture>/<program>.
ARG BUILDER=rust:1.95.0-bookworm
ARG DEBIAN=debian:bookworm-slim
ARG BASE=scratch
ARG BINARIES=compiled

FROM ${BUILDER} AS compiled
WORKDIR /src
COPY . .
# --target keeps the flag from procedural macros, which are no static programs.
RUN host=$(rustc -vV | sed -n 's/^host: //p') \
 && RUSTFLAGS='-C target-feature=+crt-static' cargo build --locked --release --target "$host" -p proxy-server -p edge-agent \
 && mkdir /out \
 && for program in proxy-server edge-agent; do strip -o "/out/$program" "target/$host/release/$program" || exit 1; done

FROM ${DEBIAN} AS compiled-nft
RUN apt-get update \
 && apt-get install -y --no-install-recommends nftables \
 && mkdir /nft \
 && cp --parents --dereference /usr/sbin/nft $(ldd /usr/sbin/nft | grep -o '/lib[^ ]*') /nft

FROM scratch AS prebuilt
ARG TARGETARCH
COPY ${TARGETARCH}/proxy-server ${TARGETARCH}/edge-agent /out/

FROM scratch AS prebuilt-nft
ARG TARGETARCH
COPY ${TARGETARCH}/nft/ /nft/

FROM ${BINARIES} AS binaries

FROM ${BINARIES}-nft AS nft

FROM ${BASE} AS proxy-server
COPY --from=binaries /out/proxy-server /bin/proxy-server
# A number, so that kubelet can see that it is not root.
USER 65532:65532
EXPOSE 8443/udp 8443/tcp 8444/tcp 8445/tcp 8446/udp 9440/tcp
ENTRYPOINT ["/bin/proxy-server"]
CMD ["run"]

FROM proxy-server AS proxy-server-redirect
COPY --from=nft /nft/ /
# Capabilities count for root alone.
USER 0:0
CMD ["redirect", "--run"]

FROM ${BASE} AS edge-agent
COPY --from=binaries /out/edge-agent /bin/edge-agent
USER 65532:65532
EXPOSE 9441/tcp
ENTRYPOINT ["/bin/edge-agent"]
CMD ["run"]
