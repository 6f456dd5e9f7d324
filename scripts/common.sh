# Sourced by the recipes and by run_tests.sh: an environment in .venv, made once and checked by a stamp.
#
#   MEGACONTEXT_PYTHON   use this interpreter as it is and install nothing
#   MEGACONTEXT_EXTRA    cpu, gpu or cuda13 (default: gpu if nvidia-smi answers, else cpu)

say() { printf '%s\n' "$*" >&2; }

find_uv() {
  if command -v uv >/dev/null 2>&1; then
    command -v uv
  else
    if [ ! -x .tools/uv/bin/uv ]; then
      say "Installing uv into .tools/ ..."
      "$(python_with_pip)" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
        --target .tools/uv uv >&2 ||
        { say "error: pip could not install uv; install uv by hand and run this again."; return 1; }
    fi
    echo .tools/uv/bin/uv
  fi
}

# find_python UV VERSION: an interpreter of this machine; also one that pyenv keeps and does not have on the PATH.
find_python() {
  local python
  "$1" python find --system --no-python-downloads "$2" 2>/dev/null && return
  for python in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$2".*/bin/python; do
    [ -x "$python" ] && echo "$python" && return
  done
  return 1
}

# python_with_pip: the first python3 of the PATH that has pip; an active environment may have none.
python_with_pip() {
  local python
  for python in $(type -aP python3); do
    "$python" -m pip --version >/dev/null 2>&1 && break
  done
  echo "$python"
}

# setup_env [--python VERSION] [--dev]: afterwards `python` is the project's, with the test tools if --dev.
# Without a version an environment that exists is taken as it is.
setup_env() {
  if [ -n "${MEGACONTEXT_PYTHON:-}" ]; then
    python() { "$MEGACONTEXT_PYTHON" "$@"; }
    return
  fi
  local version="" dev="" extra uv sum
  while [ $# -gt 0 ]; do
    case "$1" in
      --python) version="$2" && shift 2 ;;
      --dev) dev=1 && shift ;;
    esac
  done
  extra="${MEGACONTEXT_EXTRA:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}"
  sum="$(cat pyproject.toml constraints.txt | cksum)"
  if [ -z "$version" ] && [ -x .venv/bin/python ]; then version="$(cat .venv/megacontext-python 2>/dev/null)"; fi
  version="${version:-$(default_python)}"
  if [ "$(cat .venv/megacontext-base 2>/dev/null)" != "$sum $version $extra" ]; then
    uv="$(find_uv)" || return 1
    say "Setting up .venv (Python $version, $extra) ..."
    "$uv" venv --quiet --clear --python "$(find_python "$uv" "$version" || echo "$version")" .venv || return 1
    install_packages "$uv" -e ".[$extra]" || return 1
    printf '%s' "$version" >.venv/megacontext-python
    printf '%s' "$sum $version $extra" >.venv/megacontext-base
  fi
  if [ -n "$dev" ] && [ "$(cat .venv/megacontext-dev 2>/dev/null)" != "$sum" ]; then
    uv="$(find_uv)" || return 1
    install_packages "$uv" --group dev || return 1
    install_gpu_compiler "$uv" || return 1
    printf '%s' "$sum" >.venv/megacontext-dev
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

install_packages() {
  "$1" pip install --quiet --python .venv/bin/python -c constraints.txt "${@:2}" ||
    { say "error: the packages could not be installed; look at the lines above and run this again."; return 1; }
}

# install_gpu_compiler UV: what compiles the GPU kernels on a machine without a GPU, beside the environment, where
# JAX does not take it for a GPU. Without a CUDA toolkit its assembler comes along.
install_gpu_compiler() {
  [ "$(uname -sm)" = "Linux x86_64" ] || return 0
  local version folder=.tools/cuda13 parts
  version="$(.venv/bin/python -c 'import jaxlib; print(jaxlib.__version__)')" || return 1
  [ "$(cat "$folder/version" 2>/dev/null)" = "$version" ] && return 0
  parts=("jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version")
  if [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/ptxas" ]; then
    parts+=("nvidia-cuda-nvcc>=13,<13.1" "nvidia-nvvm>=13,<13.1" "nvidia-cuda-crt>=13,<13.1" "nvidia-cuda-runtime>=13,<13.1")
  fi
  say "Fetching the compiler for the GPU kernels into $folder ..."
  rm -rf "$folder"
  "$1" pip install --quiet --python .venv/bin/python --no-deps --target "$folder" "${parts[@]}" ||
    { say "error: the GPU compiler could not be installed; look at the lines above and run this again."; return 1; }
  printf '%s' "$version" >"$folder/version"
}

# The interpreter to build the environment from: 3.11 to 3.13, the one called python3 if it fits.
default_python() {
  python3 -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v if (3, 11) <= v <= (3, 13) else "3.12")' \
    2>/dev/null || echo 3.12
}

# The comment block at the head of a script is its help.
help_wanted() {
  local word
  for word in "${@:2}"; do
    case "$word" in -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
      return 0
      ;;
    esac
  done
  return 1
}

# require_accelerators CONFIG "$@": refuse before any work what this machine cannot hold.
require_accelerators() {
  local config="$1" needed have word
  shift
  for word in "$@"; do case "$word" in --dry[-_]run*) return 0 ;; esac; done
  needed="$(sed -n 's/^ *min_devices: *\([0-9]*\).*/\1/p' "configs/$config.yaml")"
  have="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
  [ "$have" -ge "${needed:-0}" ] && return 0
  say "error: $config needs $needed GPUs and this machine has $have; --dry-run prints the plan, run10.sh trains here."
  return 2
}

# begin_recipe NAME "$@": check the flags, print the plan, fix TAG and KIND (mc or vanilla). Returns 1 if that was all
# (--dry-run).
begin_recipe() {
  RECIPE="$1"
  shift
  python -m scripts.plan --recipe "$RECIPE" "$@" || exit $?
  local said
  said="$(python -m scripts.plan --recipe "$RECIPE" "$@" --print-tag)" || exit $?
  [ -n "$said" ] || return 1
  TAG="${said%$'\n'*}"
  KIND="${said##*$'\n'}"
  python -m megacontext_jax.telemetry.report begin "$TAG" || exit $?
}

# stage SCRIPT "$@": one stage of the recipe, under its tag.
stage() {
  python -m "scripts.$1" --recipe "$RECIPE" ${WANDB_RUN:+--run "$WANDB_RUN"} "${@:2}" --fresh false --tag "$TAG"
}

# with_mc: whether the recipe was asked for MegaContext, as the scripts understand its flags.
with_mc() { [ "$KIND" = mc ]; }
