# shellcheck shell=bash
# Debian packages that a script needs: installed when we are root, named otherwise.

# need_packages PROGRAM:PACKAGE... - makes sure that every program (or file, if it begins with /) is there.
need_packages() {
    local pair missing=()
    for pair in "$@"; do
        local program=${pair%%:*} package=${pair#*:}
        if [[ $program == /* ]]; then
            [[ -e $program ]] || missing+=("$package")
        else
            command -v "$program" >/dev/null || missing+=("$package")
        fi
    done
    ((${#missing[@]} == 0)) && return 0
    if ((EUID != 0)); then
        echo "$0: missing packages: ${missing[*]}; install them with: sudo apt-get install ${missing[*]}" >&2
        return 1
    fi
    echo "installing ${missing[*]}" >&2
    local apt=(apt-get --option DPkg::Lock::Timeout=300 --yes --quiet=2)
    # The package lists of a fresh machine are empty or old.
    DEBIAN_FRONTEND=noninteractive "${apt[@]}" install --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install --no-install-recommends "${missing[@]}"; } >&2
}

# What building and the native tests need.
need_build_packages() {
    # protoc and its own files: the etcd client is generated when it is built.
    need_packages cc:gcc pkg-config:pkg-config /usr/include/libudev.h:libudev-dev protoc:protobuf-compiler \
        /usr/include/google/protobuf/descriptor.proto:libprotobuf-dev
}

need_test_packages() {
    need_packages fio:fio nbdinfo:libnbd-bin qemu-img:qemu-utils qemu-io:qemu-utils sqlite3:sqlite3 \
        shellcheck:shellcheck ip:iproute2 etcd:etcd-server openssl:openssl
}

# need_cargo_program NAME - a program that cargo installs, by the name of its package.
need_cargo_program() {
    command -v "$1" >/dev/null && return 0
    [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/$1 ]] && return 0
    echo "installing $1" >&2
    cargo install --locked --quiet "$1"
}
