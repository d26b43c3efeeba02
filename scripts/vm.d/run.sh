# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153 # variables that scripts/vm and its other parts set or use
# One machine: its project disk, its QEMU, and what became of it. Sourced by scripts/vm.

# How long the machine may take until COMMAND runs. Seconds on an idle host; the rest is for busy ones.
BOOT_TIMEOUT_S=120
# From COMMAND's exit code to the end of QEMU.
END_TIMEOUT_S=10

# Makes the disk that carries everything that differs from run to run. An ext4 image rather than an archive: nothing is
# unpacked inside, where copying is slow, and only what is used is ever read, so programs keep their debug information.
# usage: make_project_disk COMMAND...
make_project_disk() {
    local stage=$SCRATCH/project target=${CARGO_TARGET_DIR:-$CHECKOUT/target} profile dir file size_kb pair
    mkdir --parents "$stage/bin" "$stage/.vm"

    for dir in scripts tests; do
        [[ -d $CHECKOUT/$dir ]] || continue
        mkdir "$stage/$dir"
        tar --directory="$CHECKOUT/$dir" --exclude=./target --create . |
            tar --directory="$stage/$dir" --no-same-owner --extract
    done
    for dir in modprobe.d modules-load.d; do
        [[ -d $CHECKOUT/kmod/$dir ]] || continue
        mkdir --parents "$stage/kmod"
        cp --recursive "$CHECKOUT/kmod/$dir" "$stage/kmod/"
    done

    profile=$PROFILE
    if [[ -z $profile ]]; then
        profile=debug
        [[ -z $(executables "$target/release") ]] || profile=release
    fi
    for dir in "$target/$profile" "${BIN_DIRS[@]}"; do
        while read -r file; do
            cp --reflink=auto --dereference "$dir/$file" "$stage/bin/$file"
        done < <(executables "$dir")
    done
    for file in "${SHIP[@]}"; do cp --reflink=auto --dereference "$file" "$stage/bin/"; done

    cp "$LIB/guest-init" "$LIB/guest-fstab" "$stage/.vm/"
    mkdir "$stage/.vm/dev" "$stage/.vm/dev/pts" "$stage/.vm/dev/shm"
    ln --symbolic /proc/self/fd "$stage/.vm/dev/fd"
    ln --symbolic fd/0 "$stage/.vm/dev/stdin"
    ln --symbolic fd/1 "$stage/.vm/dev/stdout"
    ln --symbolic fd/2 "$stage/.vm/dev/stderr"
    printf '%s\0' "$@" >"$stage/.vm/command"
    : >"$stage/.vm/environment"
    for pair in "${ENVIRONMENT[@]}"; do printf '%s\0' "$pair" >>"$stage/.vm/environment"; done
    printf '%s\n' "$CHDIR" >"$stage/.vm/chdir"
    if ((HOST_PATHS)); then
        target=$(realpath --canonicalize-missing -- "$target")
        # The programs may be anywhere below the target directory, and the checkout may hold it: longest path first.
        printf '%s\0' \
            "$target/debug" /project/bin "$target/release" /project/bin \
            "$CHECKOUT/scripts" /project/scripts "$CHECKOUT/tests" /project/tests >"$stage/.vm/links"
    fi

    # Room for what COMMAND writes into /project; sparse, so it costs nothing.
    size_kb=$(du --summarize --block-size=1K "$stage")
    make_ext4 "$SCRATCH/project.img" "$((${size_kb%%[[:space:]]*} + 1024 * 1024))K" "$stage"
    rm --recursive --force "$stage"
}

# Names of the executable files directly in a directory. usage: executables DIR
executables() {
    [[ ! -d $1 ]] || find -L "$1" -mindepth 1 -maxdepth 1 -type f -executable ! -name '*.so' ! -name '*.d' ! -name '.*' -printf '%f\n'
}

# Sets QEMU to the command line. What the machine itself writes goes to MACHINE_DIR.
make_qemu_command() {
    local root kernel disk n=0
    root=$(root_dir)/root.img
    kernel=$(kernel_dir "$KERNEL")
    # shellcheck disable=SC2054 # the commas are QEMU's
    QEMU=(
        qemu-system-x86_64
        -name "ublk-mirror-$KERNEL" -nodefaults -no-user-config -no-reboot -display none -monitor none
        # Emulation always: where KVM is offered, Debian's own kernels may die under it. Without cx16, whose emulation in
        # QEMU 7.2 leaves wrong flags behind and makes kernels panic now and then.
        -machine pc,usb=off,vmport=off -accel tcg,thread=multi -cpu "max,-cx16"
        -smp "$CPUS" -m "$MEMORY_MB"
        -kernel "$kernel/kernel"
        # Boot time: no self-tests of ciphers; and the emulated machine is idle, so grace periods need not be waited for.
        # maxcpus=1: the kernel patches its own code as it starts. Between two emulated processors, which run as two threads,
        # that goes wrong now and then (Oops: int3); so the others are brought in by guest-init, when this is over.
        # panic=-1: reboot at once, which ends QEMU; a kernel that only limps on after an oops is a failed run as well.
        -append "root=PARTUUID=$ROOT_DISK_ID-01 rootfstype=ext4 rw rootwait init=/vminit console=ttyS0 quiet panic=-1 oops=panic maxcpus=1 mitigations=off cryptomgr.notests rcupdate.rcu_expedited=1"
        -serial "file:$MACHINE_DIR/console.log"
        # NVMe is built into these kernels, so this needs no initramfs. One controller, since each is probed for itself.
        -device nvme,id=nvme,serial=system
        -drive "file=$root,if=none,id=root,format=raw,snapshot=on" -device nvme-ns,bus=nvme,drive=root,nsid=1
        -drive "file=$kernel/modules.img,if=none,id=modules,format=raw,readonly=on,file.locking=off"
        -device nvme-ns,bus=nvme,drive=modules,nsid=2
        -drive "file=$SCRATCH/project.img,if=none,id=project,format=raw,cache=unsafe,snapshot=on" -device nvme-ns,bus=nvme,drive=project,nsid=3
        -device virtio-serial-pci
        -chardev "file,id=result,path=/dev/fd/1" -device virtserialport,chardev=result,nr=1,name=result
        -chardev "file,id=stdout,path=$MACHINE_DIR/stdout,append=on" -device virtserialport,chardev=stdout,nr=2,name=stdout
        -chardev "file,id=stderr,path=$MACHINE_DIR/stderr,append=on" -device virtserialport,chardev=stderr,nr=3,name=stderr
    )
    for disk in "${DISKS[@]}"; do
        truncate --size="$disk" "$SCRATCH/disk$n.img"
        QEMU+=(
            -drive "file=$SCRATCH/disk$n.img,if=none,id=disk$n,format=raw,cache=writeback,discard=unmap"
            -device "virtio-blk-pci,drive=disk$n,serial=disk$n"
        )
        n=$((n + 1))
    done
    QEMU+=("${QEMU_ARGS[@]}")
}

# Leaves behind what somebody else needs to run machines: the project's disk, and the command line of their QEMU, in which
# @MACHINE@ stands for a directory of each machine's own. usage: keep_command DIR
keep_command() {
    mv "$SCRATCH/project.img" "$1/project.img"
    MACHINE_DIR=@MACHINE@ make_qemu_command
    printf '%s\0' "${QEMU[@]//"$SCRATCH/project.img"/"$1/project.img"}" >"$1/qemu"
}

# How often a kernel may die before anything of ours runs in it.
STARTS_MAX=3

# Runs the machine and exits with COMMAND's exit code, or with one of ours.
run_machine() {
    local starts=1
    MACHINE_DIR=$SCRATCH make_qemu_command
    mkfifo "$SCRATCH/stdout" "$SCRATCH/stderr"
    attempt_machine
    # A kernel that panics before COMMAND was started is the emulator's failure and says nothing about COMMAND: what it wrote
    # is thrown away (snapshots), and it is told. Once `ready` was said, a panic is what the run was to find.
    while [[ -z $CODE ]] && ((!BOOTED)) && panicked && ((starts < STARTS_MAX)); do
        say "the kernel died while it started, before anything was run: $(panic_line); starting the machine again"
        keep_console
        starts=$((starts + 1))
        attempt_machine
    done

    [[ -z $CONSOLE ]] || cp "$SCRATCH/console.log" "$CONSOLE" || say "could not write $CONSOLE"
    if [[ -n $CODE ]]; then exit "$CODE"; fi
    if panicked; then
        fail_machine "$EX_PANIC" "the machine panicked: $(panic_line)"
    elif ((TIMED_OUT && (BOOTED || SECONDS - STARTED >= TIMEOUT_S))); then
        fail_machine "$EX_TIMEOUT" "timed out: COMMAND had not ended after $TIMEOUT_S s"
    elif ((TIMED_OUT)); then
        fail_machine "$EX_NO_BOOT" "the machine did not boot: not ready after $BOOT_TIMEOUT_S s"
    elif ((BOOTED)); then
        fail_machine "$EX_STOPPED" "the machine stopped before COMMAND ended: $(qemu_last_words)"
    else
        fail_machine "$EX_NO_BOOT" "the machine did not boot: $(qemu_last_words)"
    fi
}

panicked() { grep --quiet --text 'Kernel panic' "$SCRATCH/console.log"; }
panic_line() { grep --text --max-count=1 --only-matching 'Kernel panic.*' "$SCRATCH/console.log" | tr --delete '\r'; }

# One life of the machine. Sets CODE to COMMAND's exit code if it was told, BOOTED, TIMED_OUT and STARTED.
attempt_machine() {
    local line deadline keep_out keep_err result
    CODE='' BOOTED=0 TIMED_OUT=0 STARTED=$SECONDS
    : >"$SCRATCH/console.log"

    # The output goes through pipes and `cat`, because QEMU opens its files itself: given /dev/stdout it would truncate a
    # file that we append to. Held open here until QEMU has ended, so that nobody blocks or sees an early end.
    exec {keep_out}<>"$SCRATCH/stdout" {keep_err}<>"$SCRATCH/stderr"
    start_pump "$SCRATCH/stdout"
    start_pump "$SCRATCH/stderr" >&2

    # QEMU's stdout is the result port, so its end is also the end of the machine. It dies with us, even if we are killed;
    # its copy-on-write files go where our scratch files go.
    exec {result}< <(
        exec {keep_out}>&- {keep_err}>&-
        TMPDIR=$SCRATCH exec setpriv --pdeathsig KILL "${QEMU[@]}" </dev/null 2>"$SCRATCH/qemu.log"
    )
    QEMU_PID=$!
    deadline=$((STARTED + (TIMEOUT_S < BOOT_TIMEOUT_S ? TIMEOUT_S : BOOT_TIMEOUT_S)))
    while :; do
        if ((deadline - SECONDS <= 0)); then TIMED_OUT=1 && break; fi
        if IFS= read -r -t "$((deadline - SECONDS))" -u "$result" line; then
            case $line in
                ready) BOOTED=1 && deadline=$((STARTED + TIMEOUT_S)) ;;
                exit\ *) CODE=${line#exit } && deadline=$((SECONDS + END_TIMEOUT_S)) ;;
            esac
        elif (($? <= 128)); then
            break # end of file: QEMU has ended
        fi
    done
    kill -KILL "$QEMU_PID" 2>/dev/null || :
    wait "$QEMU_PID" 2>/dev/null || :
    QEMU_PID=
    # Everything that QEMU wrote is in the pipes; let it reach its reader.
    exec {keep_out}>&- {keep_err}>&- {result}<&-
    wait "${PUMP_PIDS[@]}" || :
    PUMP_PIDS=()
}

# Copies a pipe to stdout until its end. If nobody reads that any more the machine must go, or it would wait for ever with its
# output. usage: start_pump PIPE
start_pump() {
    local input
    # Opened before the fork: a machine that ends at once could otherwise be gone before `cat` has opened its side.
    exec {input}<"$1"
    {
        exec {keep_out}>&- {keep_err}>&-
        cat <&"$input" || kill -s PIPE "$$"
    } &
    PUMP_PIDS+=("$!")
    exec {input}<&-
}

qemu_last_words() {
    if [[ -s $SCRATCH/qemu.log ]]; then tail --lines=1 "$SCRATCH/qemu.log"; else echo "it was reset or powered off"; fi
}

# Keeps the kernel's console among the logs; prints nothing. Sets KEPT_CONSOLE.
keep_console() {
    KEPT_CONSOLE=$CACHE/logs/console-$(date +%Y%m%d-%H%M%S)-$$.log
    mkdir --parents "$CACHE/logs"
    cp "$SCRATCH/console.log" "$KEPT_CONSOLE"
    # Only the newest are of interest.
    find "$CACHE/logs" -name 'console-*.log' -mtime +7 -delete
}

# usage: fail_machine CODE MESSAGE
fail_machine() {
    local log=$CONSOLE
    if [[ -z $log ]]; then
        keep_console
        log=$KEPT_CONSOLE
    fi
    say "$2"
    say "console: $log; its end:"
    # Of a panic the lines before it matter more than the last ones of its long trace.
    awk -v max=30 '
        { line[NR] = $0 }
        /Kernel panic/ && !panic { panic = NR }
        END {
            first = panic && panic - 9 < NR - max + 1 ? panic - 9 : NR - max + 1
            for (n = first; n < first + max; n++) if (n in line) print line[n]
        }' "$log" | tr --delete '\r' >&2
    exit "$1"
}
