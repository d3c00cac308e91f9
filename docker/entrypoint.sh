#!/usr/bin/env bash
# train, doctor, simulate, serve, … are our commands; anything else runs as it is written.
set -euo pipefail

# What CANN's libraries need; only its images have the file.
set_env=${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/ascend-toolkit/latest}/../set_env.sh
if [ -f "$set_env" ]; then
	set +u
	# shellcheck disable=SC1090
	source "$set_env"
	set -u
fi

case "${1:-}" in
train | doctor | serve | generate | evaluate | convert | compress | calibrate | report)
	exec python -m "pangu.$1" "${@:2}"
	;;
simulate) exec python -m simulator "${@:2}" ;;
*) exec "$@" ;;
esac
