#!/usr/bin/env bash
# Brings what the real-Kubernetes suite needs: Debian packages that are missing, and kube-apiserver, kubelet and
# kubectl, built from the Go module beside this file into e2e/.cache/bin. Does nothing when all of it is there.
set -euo pipefail
cd "$(dirname "$0")"
bin=$(cd .. && pwd)/.cache/bin
version=$(sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\).*/\1/p' k8s/go.mod)

# program=package: what the harness starts, and where Debian keeps it
missing=()
for need in etcd=etcd-server containerd=containerd ctr=containerd runc=runc busybox=busybox-static iptables=iptables \
  nft=nftables ip=iproute2 nsenter=util-linux script=bsdutils /usr/lib/cni/bridge=containernetworking-plugins; do
  PATH=$PATH:/usr/sbin:/sbin command -v "${need%%=*}" >/dev/null || missing+=("${need#*=}")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

stamp=$(cat k8s/go.mod k8s/go.sum build.sh | sha256sum)
if [ "$(cat "$bin/.stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
echo "building Kubernetes $version (minutes when Go's build cache is cold)"
mkdir -p "$bin"
minor=${version#v*.}
# Without these the programs call themselves v0.0.0.
package=k8s.io/component-base/version
(cd k8s && CGO_ENABLED=0 go build -trimpath -o "$bin" \
  -ldflags "-s -w -X $package.gitVersion=$version -X $package.gitMajor=${version:1:1} -X $package.gitMinor=${minor%%.*}" tool)
echo "$stamp" >"$bin/.stamp"
