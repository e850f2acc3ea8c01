#!/usr/bin/env bash
# Builds the images of the Dockerfile with buildah, without a daemon and without a registry: compiles static programs here
# and copies them in. Writes target/images/NAME-ARCH.tar (docker-archive) and fails if an image is larger than 15 MiB to
# pull: registries keep layers compressed.
#
#   ARCH="amd64 arm64"   for which machines; this one's by default
#   PROFILE=release      how they are compiled; `quick` takes the programs of `make bins` where that is the same machine
#
# arm64 on an amd64 Debian is compiled with Debian's own compiler, which `make tools` installs with the rest.
set -euo pipefail
cd "$(dirname "$0")/../.."
host=$(dpkg --print-architecture 2>/dev/null || uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')
read -ra archs <<<"${ARCH:-$host}"
profile=${PROFILE:-release}
limit=$((15 << 20))
out=target/images
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
images=(proxy-server proxy-server-redirect edge-agent)
declare -A triples=([amd64]=x86_64-unknown-linux-gnu [arm64]=aarch64-unknown-linux-gnu)
declare -A strips=([amd64]=strip [arm64]=strip)
if [ "$host" != arm64 ]; then strips[arm64]=aarch64-linux-gnu-strip; fi
if [ "$host" != amd64 ]; then strips[amd64]=x86_64-linux-gnu-strip; fi

# Compiles for $1, if it is not what `make bins` has just compiled.
compile() {
  local triple=${triples[$1]} key
  key=$(tr a-z- A-Z_ <<<"$triple")
  local -a environment=("CARGO_TARGET_${key}_RUSTFLAGS=-C target-feature=+crt-static")
  if [ "$1" != "$host" ]; then
    [ "$1" = arm64 ] || { echo "$1 can't be compiled on $host" >&2; exit 1; }
    # Not rustup's: it has no standard library for arm64 unless one is fetched.
    environment+=(RUSTC=/usr/bin/rustc "CARGO_TARGET_${key}_LINKER=aarch64-linux-gnu-gcc" "CC_${triple//-/_}=aarch64-linux-gnu-gcc")
  elif [ "$profile" = quick ]; then
    return
  fi
  env "${environment[@]}" cargo build --quiet --locked --profile "$profile" --target "$triple" -p proxy-server -p edge-agent
}

# Puts Debian's nft for $1 into $2, with the libraries that it needs.
nft() {
  local debs=$out/debs/$1 root triple=${triples[$1]/-unknown/} wanted=(usr/sbin/nft) file library
  root=$(mktemp -d -p "$store")
  mkdir -p "$debs"
  if ! ls "$debs"/nftables_*.deb >/dev/null 2>&1; then
    local packages
    # A machine may have no lists, or none of that architecture.
    if ! apt-cache show "nftables:$1" >/dev/null 2>&1; then
      dpkg --add-architecture "$1"
      apt-get update -qq
    fi
    packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
      --no-enhances "nftables:$1" | sed -n 's/^\(lib[^ :]*\|nftables\)\(:[^ ]*\)\?$/\1/p' | sort -u)
    (cd "$debs" && apt-get download -qq -o APT::Sandbox::User=root $(printf "%s:$1 " $packages))
  fi
  for file in "$debs"/*.deb; do dpkg-deb --extract "$file" "$root"; done
  while [ ${#wanted[@]} -gt 0 ]; do
    file=${wanted[0]}
    wanted=("${wanted[@]:1}")
    [ ! -e "$2/$file" ] || continue
    install -D "$root/$file" "$2/$file"
    for library in $(readelf --dynamic "$2/$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
      for file in {,usr/}lib/"$triple/$library" lib{64,}/"$library"; do
        if [ -e "$root/$file" ]; then wanted+=("$file"); break; fi
      done
      [ -e "$root/$file" ] || { echo "no $library for $1 in Debian's packages" >&2; exit 1; }
    done
  done
  file=$(readelf --program-headers "$2/usr/sbin/nft" | sed -n 's/.*interpreter: \/\(.*\)\]/\1/p')
  install -D "$root/$file" "$2/$file"
}

mib() {
  echo "$(($1 >> 20)).$((($1 * 10 >> 20) % 10))"
}

buildah() {
  command buildah --storage-driver vfs --root "$store/root" --runroot "$store/run" "$@"
}

store=$(mktemp -d)
trap 'command buildah --storage-driver vfs --root "$store/root" --runroot "$store/run" rm --all >/dev/null 2>&1 || true; rm -rf "$store"' EXIT
created=$(git log -1 --format=%ct 2>/dev/null || echo 0)
for arch in "${archs[@]}"; do
  compile "$arch"
  context=$out/context
  rm -rf "$context"
  mkdir -p "$context/$arch"
  for program in proxy-server edge-agent; do
    "${strips[$arch]}" -o "$context/$arch/$program" "target/${triples[$arch]}/$profile/$program"
    # Without a system below it a program that asks for a loader does not start.
    if readelf --program-headers "$context/$arch/$program" | grep -q INTERP; then
      echo "$program for $arch is not linked statically" >&2
      exit 1
    fi
  done
  nft "$arch" "$context/$arch/nft"
  for image in "${images[@]}"; do
    name=localhost/corvid/$image:$version archive=$out/$image-$arch.tar
    buildah build --quiet --isolation chroot --platform "linux/$arch" --timestamp "$created" \
      --build-arg BINARIES=prebuilt --target "$image" --tag "$name" --file Dockerfile "$context" >/dev/null
    rm -f "$archive"
    buildah push --quiet "$name" "docker-archive:$archive:$name"
    size=$(stat -c %s "$archive") pulled=$(gzip --stdout "$archive" | wc -c)
    printf '%s  %s  %s MiB, %s MiB to pull\n' "$archive" "$name" "$(mib "$size")" "$(mib "$pulled")"
    # What is compiled in a hurry is not what anybody pulls.
    if [ "$pulled" -gt "$limit" ] && [ "$profile" = release ]; then
      echo "$archive is larger than $((limit >> 20)) MiB to pull" >&2
      exit 1
    fi
  done
done
rm -rf "$out/context"
