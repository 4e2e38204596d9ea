# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts that set a Debian or Ubuntu machine up; the caller defines die().

# Installs what is missing when this user may, else says how.
need_packages() {
  local missing=() package
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      die "packages are missing; install them with:  sudo apt-get install ${missing[*]}"
    fi
    as_root=(sudo -n)
  fi
  echo "installing: ${missing[*]}"
  "${as_root[@]}" apt-get update -qq || echo "the package lists could not be refreshed; going on with the old ones"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
