#!/usr/bin/env bash
# Brings what lab, images and the real-Kubernetes suite need: Debian packages that are missing, and the tools of the Go modules
# beside this file, built into e2e/.cache/bin. Does nothing when all of it is there.
set -euo pipefail
cd "$(dirname "$0")"
bin=$(cd .. && pwd)/.cache/bin

# program=package: what the harness starts, and where Debian keeps it
missing=()
for need in etcd=etcd-server containerd=containerd ctr=containerd runc=runc busybox=busybox-static iptables=iptables \
  nft=nftables prometheus=prometheus prometheus-node-exporter=prometheus-node-exporter \
  ip=iproute2 nsenter=util-linux script=bsdutils /usr/lib/cni/bridge=containernetworking-plugins \
  buildah=buildah readelf=binutils; do
  PATH=$PATH:/usr/sbin:/sbin command -v "${need%%=*}" >/dev/null || missing+=("${need#*=}")
done
# Images of the other architecture: Debian's own compiler has its standard library, rustup's has not.
if [ "$(dpkg --print-architecture)" = amd64 ]; then
  for need in qemu-user-static gcc-aarch64-linux-gnu libc6-dev-arm64-cross rustc-web libstd-rust-web-dev:arm64; do
    dpkg-query --show --showformat='${Status}' "$need" 2>/dev/null | grep -q ' installed' || missing+=("$need")
  done
  dpkg --add-architecture arm64
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  apt-get update -qq
  # RUNLEVEL: the programs are wanted, not their services.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The version of Kubernetes that a module is built of, or else the suite's, as a linker's flags: else the programs call
# themselves v0.0.0.
named() {
  local version minor package=k8s.io/component-base/version
  version=$(sed -n 's/^\tk8s.io\/kubernetes .*\(v[0-9][0-9.]*\).*/\1/p' "$1/go.mod" k8s/go.mod | head -1)
  minor=${version#v*.}
  echo "-X $package.gitVersion=$version -X $package.gitMajor=${version:1:1} -X $package.gitMinor=${minor%%.*}"
}

mkdir -p "$bin"
for module in konnectivity k8s metrics-server coredns k3s; do
  stamp=$(cat "$module"/* build.sh | sha256sum)
  if [ "$(cat "$bin/.stamp-$module" 2>/dev/null)" = "$stamp" ]; then continue; fi
  echo "building the tools of e2e/kubernetes/$module (minutes when Go's build cache is cold)"
  # A program of ours, or the tools that the go.mod names.
  what=tool
  if [ -e "$module/main.go" ]; then what=.; fi
  flags=$(named "$module")
  # k3s has C in it.
  cgo=0
  if [ "$module" = k3s ]; then cgo=1; fi
  (cd "$module" && CGO_ENABLED=$cgo go build -trimpath -o "$bin" -ldflags "-s -w $flags" "$what")
  echo "$stamp" >"$bin/.stamp-$module"
done
