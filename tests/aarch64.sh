#!/bin/sh
# Makes FOLDER/python, a Python with PyTorch for AArch64 that QEMU runs here, and FOLDER/g++, a compiler for it: all from
# Debian and PyPI, without root. `make aarch64` runs the tests with them. Usage: sh tests/aarch64.sh FOLDER PIP
set -eu
folder=$1 pip=$2
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg; do
  command -v "$tool" >/dev/null || {
    echo "tests/aarch64.sh: $tool is missing, expected Debian with g++-aarch64-linux-gnu and qemu-user installed" >&2
    exit 1
  }
done
mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial" "$folder/debs" "$folder/root"

# Packages of the same release as the compiler's libraries, from where this machine has its own, whose lists stay
# untouched.
: >"$folder/apt/status"
cat >"$folder/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures "arm64";
Dir::State::lists "$folder/apt/lists";
Dir::State::status "$folder/apt/status";
Dir::Cache "$folder/apt/cache";
END
export APT_CONFIG="$folder/apt.conf"
apt-get -qq update
cd "$folder/debs"
needed=$(apt-get install -s --no-install-recommends python3 libpython3-dev libstdc++6 | sed -n 's/^Inst \([^ ]*\).*/\1/p')
apt-get -qq download $needed
for package in *.deb; do dpkg -x "$package" "$folder/root"; done

cat >"$folder/python" <<END
#!/bin/sh
exec qemu-aarch64 -L "$folder/root" "$folder/root/usr/bin/python3" "\$@"
END
# With the headers of that Python in place of the machine's own.
cat >"$folder/g++" <<END
#!/bin/sh
exec aarch64-linux-gnu-g++ -I "$(echo "$folder"/root/usr/include/python3.*)" -idirafter "$folder/root/usr/include" "\$@"
END
chmod +x "$folder/python" "$folder/g++"
# PyPI's last PyTorch for AArch64 that needs no libraries of CUDA.
"$pip" --python "$folder/python" install -q --root-user-action ignore --target "$folder/site" --upgrade \
  torch==2.10.0 numpy scipy pytest
