# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153 # variables that scripts/vm and its other parts set or use
# How the root image is made. Sourced by scripts/vm; a change of this file makes a new image.

build_root() {
    local build=$CACHE/.build-root.$$ start=$SECONDS packages line options=() sources=()
    find_debian_archive
    say "building the root image (a minute or two)"
    mkdir --parents "$build"
    packages=$(sed --expression='s/#.*//' "$LIB/packages" | tr --squeeze-repeats '[:space:]' ',')
    for line in "${APT_TRANSPORT[@]}"; do options+=(--aptopt="$line"); done
    # Nobody reads manuals in there, and translations are half of the files.
    for line in doc man info locale lintian bug; do options+=(--dpkgopt="path-exclude=/usr/share/$line/*"); done
    sources=(
        "deb [signed-by=$ARCHIVE_KEY] $ARCHIVE_URI $SUITE main"
        "deb [signed-by=$ARCHIVE_KEY] $ARCHIVE_URI $SUITE-updates main"
    )
    [[ -n $SECURITY_URI ]] && sources+=("deb [signed-by=$SECURITY_KEY] $SECURITY_URI $SUITE-security main")
    # shellcheck disable=SC2016 # $1 is for the hook's shell
    # The hook keeps the database package from making a cluster: every test makes its own, where it wants it.
    mmdebstrap --mode=root --variant=essential --components=main --architectures=amd64 "${options[@]}" \
        --include="${packages//,,/,}" \
        --essential-hook='mkdir --parents "$1/etc/postgresql-common"' \
        --essential-hook='echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.conf"' \
        "$SUITE" "$build/root" "${sources[@]}" >"$build/log" 2>&1 || {
        tail --lines=20 "$build/log" >&2
        die "$EX_HOST" "mmdebstrap failed; is this machine's debian-archive-keyring too old for $SUITE?"
    }
    # Neither the archive's address nor the way to it belongs into the image.
    rm --recursive --force "$build/root"/etc/apt/sources.list* "$build/root"/etc/apt/apt.conf.d/99mmdebstrap
    install --mode=0755 "$LIB/stage1-init" "$build/root/vminit"
    mkdir --parents "$build/root/project" "$build/root/usr/lib/modules" "$build/root/mnt"
    echo 'options ublk_drv ublks_max=64' >"$build/root/etc/modprobe.d/00-vm.conf"
    echo ublk-vm >"$build/root/etc/hostname"
    printf '127.0.0.1 localhost ublk-vm\n::1 localhost\n' >"$build/root/etc/hosts"
    : >"$build/root/etc/fstab"
    rm --force "$build/root/etc/mtab"
    ln --symbolic /proc/self/mounts "$build/root/etc/mtab"
    make_ext4 "$build/root.img" 6G "$build/root" "$((ROOT_START_SECTOR * 512))"
    printf 'label: dos\nlabel-id: 0x%s\nstart=%d, type=83\n' "$ROOT_DISK_ID" "$ROOT_START_SECTOR" |
        sfdisk --quiet --wipe never --wipe-partitions never "$build/root.img" >"$build/log" 2>&1 ||
        die "$EX_HOST" "sfdisk: $(tail --lines=1 "$build/log")"
    rm --recursive --force "$build/root" "$build/log"
    publish "$build" "$(root_dir)"
    say "root image built in $((SECONDS - start)) s"
}
