# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153 # variables that scripts/vm and its other parts set or use
# What the host must have: its tools, and where its own apt configuration says that Debian's archive is.
# Sourced by scripts/vm.

# An apt that works on configuration and state in a directory of its own, so that nothing is left on the machine.
# usage: private_apt_options DIR SOURCES_DIR; sets APT_PRIVATE
private_apt_options() {
    local dir=$1 sources=$2
    mkdir --parents "$dir/lists/partial" "$dir/archives/partial" "$dir/preferences"
    APT_PRIVATE=(
        --option "Dir::Etc::SourceList=/dev/null"
        --option "Dir::Etc::SourceParts=$sources"
        --option "Dir::Etc::Preferences=/dev/null"
        --option "Dir::Etc::PreferencesParts=$dir/preferences"
        --option "Dir::State::Lists=$dir/lists"
        --option "Dir::Cache::archives=$dir/archives"
        --option "Dir::Cache::pkgcache="
        --option "Dir::Cache::srcpkgcache="
        --option "Acquire::Languages=none"
        # The sandbox user of apt cannot write into our scratch directory.
        --option "APT::Sandbox::User=root"
    )
}

# Prints `URI|ENTRY` of the archive with the given label (Debian, Debian-Security) that this machine uses; ENTRY is the place
# in the configuration, FILE:N. usage: apt_archive LABEL [APT OPTION...]
apt_archive() {
    local label=$1
    shift
    # shellcheck disable=SC2016 # these are apt's variables
    apt-get "$@" indextargets \
        --format '$(LABEL)|$(COMPONENT)|$(REPO_URI)|$(SOURCESENTRY)' 'Created-By: Packages' 2>/dev/null |
        awk -F '|' -v label="$label" '$1 == label && $2 == "main" && $3 !~ /^cdrom:/ && !found++ { print $3 "|" $4 }'
}

# Prints the keyring that an entry of apt's configuration names, or nothing. usage: apt_entry_key FILE:N
apt_entry_key() {
    local file=${1%:*} number=${1##*:}
    case $file in
        *.sources) # N counts the paragraphs
            awk -v RS='' -v number="$number" 'NR == number' "$file" |
                awk 'tolower($1) == "signed-by:" && $2 ~ /^\// { print $2; exit }' ;;
        *) # N counts the lines
            sed --quiet --regexp-extended "${number}s/^[^]]*signed-by=([^] ]+).*/\1/p" "$file" ;;
    esac
}

# Finds Debian's archive in this machine's apt configuration; needs SCRATCH.
# Sets ARCHIVE_URI, ARCHIVE_KEY and SECURITY_URI (empty if the machine has none), SECURITY_KEY, APT_TRANSPORT.
find_debian_archive() {
    [[ -n ${ARCHIVE_URI:-} ]] && return
    command -v apt-get >/dev/null || die "$EX_HOST" "this needs a Debian host: there is no apt-get"
    local entry options=()
    entry=$(apt_archive Debian)
    if [[ -z $entry ]]; then
        # A fresh machine has never fetched the lists, and only they tell whose archive it is.
        say "fetching apt's lists"
        mkdir --parents "$SCRATCH/apt-host/lists/partial"
        options=(--option "Dir::State::Lists=$SCRATCH/apt-host/lists" --option "APT::Sandbox::User=root")
        apt-get "${options[@]}" --quiet=2 update >&2 || die "$EX_HOST" "apt-get update failed"
        entry=$(apt_archive Debian "${options[@]}")
    fi
    [[ -n $entry ]] || die "$EX_HOST" "apt's configuration on this machine names no Debian main archive to build from"
    ARCHIVE_URI=${entry%|*}
    ARCHIVE_KEY=$(apt_entry_key "${entry##*|}")
    [[ -n $ARCHIVE_KEY ]] || ARCHIVE_KEY=/usr/share/keyrings/debian-archive-keyring.gpg
    [[ -r $ARCHIVE_KEY ]] || die "$EX_HOST" "the keyring $ARCHIVE_KEY is missing (package debian-archive-keyring)"
    entry=$(apt_archive Debian-Security "${options[@]}")
    SECURITY_URI=${entry%|*}
    SECURITY_KEY=
    [[ -n $entry ]] && SECURITY_KEY=$(apt_entry_key "${entry##*|}")
    [[ -n $SECURITY_KEY ]] || SECURITY_KEY=$ARCHIVE_KEY
    # How this machine reaches archives (proxies, checks of dates); mmdebstrap does not read the host's configuration.
    mapfile -t APT_TRANSPORT < <(apt-config dump --no-empty --format '%F "%v";%n' Acquire |
        grep --extended-regexp '^Acquire::(https?::|Check-|Retries)' || :)
}

# Prints one source in deb822 form. usage: apt_source URI KEY SUITE...
apt_source() {
    local uri=$1 key=$2
    shift 2
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n' "$uri" "$*" "$key"
}

# Installs the named Debian packages if one of the commands is missing. usage: need_commands "COMMAND..." PACKAGE...
need_commands() {
    local commands=$1 missing=() command
    shift
    for command in $commands; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || die "$EX_HOST" "not installed: ${missing[*]} (as root: apt-get install $*)"
    command -v apt-get >/dev/null || die "$EX_HOST" "not installed: ${missing[*]} (Debian packages: $*)"
    # Two runs on a fresh machine must not fight over dpkg, nor a run with somebody's apt-get.
    (
        flock 9
        for command in "${missing[@]}"; do
            command -v "$command" >/dev/null || { install_packages "$@"; break; }
        done
    ) 9>"$CACHE/install.lock"
    hash -r
}

# usage: install_packages PACKAGE...
install_packages() {
    # --no-remove: where something newer of the same source is installed already (qemu-utils from backports, say), apt would
    # "solve" the conflict by removing it from under its user.
    local install=(apt-get --quiet=2 --yes --no-remove --no-install-recommends --option "DPkg::Lock::Timeout=300")
    export DEBIAN_FRONTEND=noninteractive
    say "installing $*"
    "${install[@]}" install "$@" >"$SCRATCH/install.log" 2>&1 && return
    apt-get --quiet=2 update >>"$SCRATCH/install.log" 2>&1 || : # the lists may be absent or old
    "${install[@]}" install "$@" >>"$SCRATCH/install.log" 2>&1 && return

    # Once more with this release's backports, out of sources and lists that go away with the scratch directory.
    local codename part
    find_debian_archive
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [[ -n $codename ]] || die "$EX_HOST" "could not install $*: $(tail --lines=1 "$SCRATCH/install.log")"
    mkdir --parents "$SCRATCH/apt-install/sources" "$SCRATCH/apt-install/lists/partial"
    for part in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list; do
        [[ -e $part ]] && ln --symbolic "$part" "$SCRATCH/apt-install/sources/"
    done
    apt_source "$ARCHIVE_URI" "$ARCHIVE_KEY" "$codename-backports" >"$SCRATCH/apt-install/sources/backports.sources"
    install+=(
        --option "Dir::Etc::SourceParts=$SCRATCH/apt-install/sources"
        --option "Dir::State::Lists=$SCRATCH/apt-install/lists"
        --option "Dir::Cache::pkgcache="
        --option "Dir::Cache::srcpkgcache="
        --option "APT::Sandbox::User=root"
    )
    say "installing $* with $codename-backports"
    {
        "${install[@]}" update && "${install[@]}" --target-release "$codename-backports" install "$@"
    } >>"$SCRATCH/install.log" 2>&1 ||
        die "$EX_HOST" "could not install $*: $(grep --extended-regexp '^(E|W): ' "$SCRATCH/install.log" | tail --lines=1)"
}
