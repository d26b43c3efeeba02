# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153 # variables that scripts/vm and its other parts set or use
# How a kernel is fetched. Sourced by scripts/vm; a change of this file fetches the kernels again.

# Takes the kernel proper out of its compressed image, so that QEMU starts it directly (PVH): without the firmware's loader
# and the decompression the machine is up more than a second earlier. Fails if the image is not of the known form.
# usage: unpack_kernel BZIMAGE OUTPUT
unpack_kernel() {
    local image=$1 output=$2 setup_sectors offset length tool
    # The fields of the x86 boot protocol: setup_sects, payload_offset, payload_length (with the unpacked size at its end).
    setup_sectors=$(od --address-radix=n --format=u1 --skip-bytes=$((0x1f1)) --read-bytes=1 "$image") &&
        offset=$(od --address-radix=n --format=u4 --skip-bytes=$((0x248)) --read-bytes=4 "$image") &&
        length=$(od --address-radix=n --format=u4 --skip-bytes=$((0x24c)) --read-bytes=4 "$image") || return
    tail --bytes=+$(((setup_sectors + 1) * 512 + offset + 1)) "$image" 2>/dev/null | head --bytes=$((length - 4)) >"$output.packed"
    for tool in zstd xz gzip; do
        "$tool" --decompress --stdout <"$output.packed" >"$output" 2>/dev/null && break
    done
    rm --force "$output.packed"
    [[ $(head --bytes=4 "$output") == $'\x7fELF' ]] && grep --quiet --text Xen "$output"
}

# usage: build_kernel stable|latest
build_kernel() {
    local flavour=$1 build=$CACHE/.build-kernel.$$ start=$SECONDS package packages tree kernel release
    find_debian_archive
    say "fetching the $flavour kernel"
    mkdir --parents "$build/sources" "$build/debs" "$build/tree"
    case $flavour in
        stable)
            apt_source "$ARCHIVE_URI" "$ARCHIVE_KEY" "$SUITE" "$SUITE-updates" >"$build/sources/debian.sources"
            [[ -z $SECURITY_URI ]] ||
                apt_source "$SECURITY_URI" "$SECURITY_KEY" "$SUITE-security" >>"$build/sources/debian.sources"
            ;;
        # Nothing else, so that its metapackage is the only candidate.
        latest) apt_source "$ARCHIVE_URI" "$ARCHIVE_KEY" "$SUITE-backports" >"$build/sources/debian.sources" ;;
    esac
    private_apt_options "$build/apt" "$build/sources"
    # What is installed on the host has no say in this.
    APT_PRIVATE+=(--option "Dir::State::status=/dev/null" --option "APT::Architecture=amd64")
    apt-get "${APT_PRIVATE[@]}" --quiet=2 update >&2 || die "$EX_HOST" "apt-get update for the $flavour kernel failed"
    # How a kernel is cut into packages has changed (image; image and modules; binary and modules): take what it depends on.
    packages=$(apt-cache "${APT_PRIVATE[@]}" depends --recurse --important linux-image-cloud-amd64 |
        grep --extended-regexp '^linux-(image|binary|modules)-[0-9].*-cloud-amd64$' | sort --unique || :)
    [[ -n $packages ]] || die "$EX_HOST" "the archive has no cloud kernel in the suite for '$flavour'"
    # shellcheck disable=SC2086 # a list of words
    (cd "$build/debs" && apt-get "${APT_PRIVATE[@]}" --quiet=2 download $packages >&2) ||
        die "$EX_HOST" "could not fetch $packages"
    for package in "$build"/debs/*.deb; do dpkg-deb --extract "$package" "$build/tree"; done

    # Either place, according to the packages' age; a kernel may even use both.
    mkdir --parents "$build/image"
    for tree in "$build"/tree/lib/modules "$build"/tree/usr/lib/modules; do
        [[ ! -d $tree ]] || cp --recursive --no-dereference "$tree/." "$build/image/"
    done
    kernel=$(find "$build/tree" -type f -name 'vmlinuz*' -print -quit)
    release=$(find "$build/image" -mindepth 2 -maxdepth 2 -type d -name kernel -printf '%h' -quit)
    [[ -n $kernel && -n $release ]] || die "$EX_HOST" "no kernel or no modules in: $packages"
    unpack_kernel "$kernel" "$build/kernel" || cp "$kernel" "$build/kernel"
    release=${release##*/}
    # Unpacked here once rather than by the emulated processor at every start.
    find "$build/image" -name '*.ko.xz' -exec xz --decompress --threads=2 {} +
    mkdir --parents "$build/depmod/lib"
    ln --symbolic "$build/image" "$build/depmod/lib/modules"
    depmod --basedir "$build/depmod" "$release" 2>"$build/log" || die "$EX_HOST" "depmod: $(tail --lines=1 "$build/log")"
    rm --force "$build/image/$release/build" "$build/image/$release/source" "$build/image/$release"/vmlinuz*
    make_ext4 "$build/modules.img" 512M "$build/image"
    echo "$release" >"$build/release"
    rm --recursive --force "$build"/{sources,debs,tree,apt,depmod,image,log}
    publish "$build" "$(kernel_dir "$flavour")"
    say "$flavour kernel is $release (fetched in $((SECONDS - start)) s)"
}
