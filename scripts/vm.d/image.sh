# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153 # variables that scripts/vm and its other parts set or use
# What is built once and cached: the root image (root.sh), and a kernel with its modules for each flavour (kernel.sh).
# Sourced by scripts/vm.

# Debian's release inside; its backports have the newer kernel.
SUITE=trixie

# The root is found by its partition's id, the only name that does not depend on the order in which the kernel finds disks
# and that needs no initramfs.
ROOT_DISK_ID=75626c6b
ROOT_START_SECTOR=2048

# Directories that exist only when they are complete. Their names carry a hash of what they are made from, so that a changed
# recipe is another directory. usage: root_dir; kernel_dir FLAVOUR
root_dir() { echo "$CACHE/root-$(recipe_hash "$LIB/packages" "$LIB/stage1-init" "$LIB/root.sh")"; }
kernel_dir() { echo "$CACHE/kernel-$1-$(recipe_hash "$LIB/kernel.sh")"; }
recipe_hash() { { echo "$SUITE $ROOT_DISK_ID" && cat "$@"; } | sha256sum | cut --characters=1-16; }

# Builds what is missing, or everything if REFRESH=1. usage: ensure_cache FLAVOUR...
ensure_cache() {
    local flavour missing=0
    [[ -d $(root_dir) ]] || missing=1
    for flavour in "$@"; do
        [[ -d $(kernel_dir "$flavour") ]] || missing=1
    done
    if ((missing || REFRESH)); then
        need_commands "mmdebstrap mke2fs sfdisk depmod xz zstd dpkg-deb" mmdebstrap e2fsprogs fdisk kmod xz-utils zstd dpkg
        # mmdebstrap can build as an ordinary user, but the files of its image then belong to ids that we cannot read.
        ((EUID == 0)) || die "$EX_HOST" "building the machine needs root; once: sudo env UBLK_MIRROR_CACHE=${CACHE%/vm} $0 build --kernel all"
        # Not followed by `||`, which would switch errexit off in there and let a failed build pass.
        (
            flock 9
            # Whoever holds the lock is the only builder, so what is half built here was left by one that died.
            rm --recursive --force "$CACHE"/.build-*
            # Looked at again: another builder may have done it while we waited.
            [[ -d $(root_dir) && $REFRESH = 0 ]] || build_root
            for flavour in "$@"; do
                [[ -d $(kernel_dir "$flavour") && $REFRESH = 0 ]] || build_kernel "$flavour"
            done
            # Results of other recipes (another branch's, say) that nobody has used for two weeks.
            find "$CACHE" -mindepth 1 -maxdepth 1 -type d \( -name 'root-*' -o -name 'kernel-*' \) -mtime +14 \
                -exec rm --recursive --force {} +
        ) 9>"$CACHE/build.lock"
    fi
    touch --no-create "$(root_dir)" 2>/dev/null || :
    for flavour in "$@"; do touch --no-create "$(kernel_dir "$flavour")" 2>/dev/null || :; done
}

# Puts a finished directory in its place. usage: publish BUILD_DIR FINAL_DIR
publish() {
    sync --file-system "$1"
    # A running machine keeps the files it has open.
    if [[ -d $2 ]]; then mv --no-target-directory "$2" "$CACHE/.build-old.$$"; fi
    mv --no-target-directory "$1" "$2"
    rm --recursive --force "$CACHE/.build-old.$$"
}

# usage: make_ext4 IMAGE SIZE DIR [OFFSET_BYTES]
make_ext4() {
    local image=$1 size=$2 dir=$3 offset=${4:-0} bytes
    truncate --size="$size" "$image"
    bytes=$(stat --format=%s "$image")
    # Every run starts from this image again, so a journal protects nothing; and nothing is left to be initialised later,
    # which the kernel would do while the tests run.
    mke2fs -q -F -t ext4 -m 0 -O ^has_journal -E "lazy_itable_init=0,offset=$offset" -d "$dir" "$image" \
        "$(((bytes - offset) / 1024))K" >/dev/null
}
