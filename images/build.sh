#!/usr/bin/env bash
# Build images with whatever engine is here, and print what belongs into a cluster file:
#   images/build.sh [--push] [--registry registry.example.com/team] [trainer launcher prepare mlflow]
set -euo pipefail
cd "$(dirname "$0")/.."
push=; registry=; names=()
while [ $# -gt 0 ]; do
  case $1 in
    --push) push=1 ;;
    --registry) registry=${2:?--registry needs a name}/; shift ;;
    -*) echo "unknown option: $1" >&2; exit 2 ;;
    *) [ -f "images/$1/Containerfile" ] || { echo "no such image: $1" >&2; exit 2; }; names+=("$1") ;;
  esac
  shift
done
[ ${#names[@]} -gt 0 ] || names=(trainer launcher prepare mlflow)
engine=$(command -v podman || command -v docker || command -v nerdctl) || {
  echo "missing: podman, docker or nerdctl" >&2; exit 2; }

arguments=()
declare -A version
while IFS='=' read -r key value; do
  case $key in ''|'#'*) continue ;; esac
  version[$key]=$value
  arguments+=(--build-arg "$key=$value")
done < images/versions.env

for name in "${names[@]}"; do
  tag=$registry${version[${name^^}_IMAGE]}
  # Only the ARGs that the file declares: the others would be warned about.
  wanted=()
  for ((i = 1; i < ${#arguments[@]}; i += 2)); do
    grep -q "^ARG ${arguments[i]%%=*}$" "images/$name/Containerfile" && wanted+=(--build-arg "${arguments[i]}")
  done
  "$engine" build -f "images/$name/Containerfile" -t "$tag" "${wanted[@]}" .
  if [ -n "$push" ]; then
    "$engine" push "$tag"
    "$engine" inspect --format "$name: {{index .RepoDigests 0}}" "$tag"
  else
    echo "$name: $tag (push it to get the digest that a cluster file needs)"
  fi
done
