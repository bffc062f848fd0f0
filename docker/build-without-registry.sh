#!/usr/bin/env bash
# Build the image where no container registry can be reached: on a base that is made from Debian's packages.
#
#   sudo docker/build-without-registry.sh [--mirror URL] [ARGUMENT OF buildah bud ...]
#
#   --mirror URL   of Debian's packages; otherwise debootstrap's own
#
# Needs root, debootstrap and buildah, and pip's packages: PyPI's, and PyTorch's for the CPU. Where these come from
# elsewhere, hand over pip's own configuration and what it names; neither becomes part of the image:
#
#   sudo docker/build-without-registry.sh --secret id=pip,src=/etc/pip.conf --volume /srv/wheels:/srv/wheels:ro \
#       --build-arg TORCH_INDEX_URL=https://pypi.example/simple
#
# The base stays as localhost/mend-base:bookworm, and is used again; the image is localhost/mend-service. To bring it
# to a Docker engine: buildah push mend-service docker-archive:mend-service.tar:mend-service:latest; docker load
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suite=bookworm # the one with Python 3.11, which docker/constraints.txt is for
base=localhost/mend-base:$suite
mirror=()
if [[ ${1-} == --mirror ]]; then
    mirror=("${2:?--mirror wants a URL}")
    shift 2
fi
if ((EUID)); then
    echo "debootstrap needs root" >&2
    exit 1
fi
for program in buildah debootstrap; do
    if ! command -v $program >/dev/null; then
        echo "$program is missing; on Debian and Ubuntu: apt-get install buildah debootstrap" >&2
        exit 1
    fi
done

make_base() {
    local root container
    root=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf --one-file-system '$root'" EXIT
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv $suite "$root" "${mirror[@]}"
    ln -s /usr/bin/python3 "$root/usr/local/bin/python"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/usr/share/{doc,locale,man}/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" /
    buildah config --cmd python --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet --rm "$container" "$base"
}

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    make_base
fi
# Of the two formats of images only Docker's knows health checks.
exec buildah bud --isolation chroot --format docker --layers --build-arg BASE_IMAGE="$base" --tag mend-service "$@" .
