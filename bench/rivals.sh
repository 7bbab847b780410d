#!/usr/bin/env bash
# Installs the rivals that mesh-bench measures, at fixed versions, into target/rivals/bin, where it looks before PATH.
# Uses cargo for boringtun-cli and gotatun, and Go (1.24 or newer), where it is installed, for wireguard-go.
# What is there at the right version stays; target/rivals/versions says what that is.
set -euo pipefail
cd "$(dirname "$0")/.."

boringtun=0.7.1
gotatun=0.10.2
# wireguard-go 0.0.20250522 with newer golang.org/x modules than it asks for: what a packager of today would link.
wireguard_go=v0.0.0-20250521234502-f333402bd9cb
x_modules=(golang.org/x/crypto@v0.45.0 golang.org/x/net@v0.47.0 golang.org/x/sys@v0.38.0)

root=$PWD/target/rivals
mkdir -p "$root/bin"
touch "$root/versions"

# installed NAME WHAT: is this very thing there?
installed() { [[ -x $root/bin/$1 ]] && grep -qxF "$1 $2" "$root/versions"; }
note() {
  { grep -v "^$1 " "$root/versions" || true; echo "$1 $2"; } >"$root/versions.part"
  mv "$root/versions.part" "$root/versions"
}

cargo_rival() { # NAME CRATE VERSION
  installed "$1" "$3" && return
  # Outside the workspace, whose profiles and minimum Rust version are not theirs.
  (cd "$root" && cargo install --quiet --locked --force --root "$root" "$2@$3")
  note "$1" "$3"
}

go_rival() {
  local what="$wireguard_go ${x_modules[*]}"
  installed wireguard-go "$what" && return
  if ! command -v go >/dev/null; then
    echo "wireguard-go is not installed: there is no Go here (Debian: apt-get install golang-go, then run this again)" >&2
    return
  fi
  local module
  module=$(mktemp -d)
  (
    cd "$module"
    export GOFLAGS=-mod=mod
    go mod init rivals
    go get "golang.zx2c4.com/wireguard@$wireguard_go" "${x_modules[@]}"
    go build -trimpath -o "$root/bin/wireguard-go" golang.zx2c4.com/wireguard
  ) 2>"$root/wireguard-go.log" || { cat "$root/wireguard-go.log" >&2; rm -rf "$module"; return 1; }
  rm -rf "$module"
  note wireguard-go "$what"
}

go_rival
cargo_rival boringtun-cli boringtun-cli "$boringtun"
cargo_rival gotatun gotatun-cli "$gotatun"
cat "$root/versions"
