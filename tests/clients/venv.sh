# Sourced by the run.sh beside this file and by others that need its Python packages: makes .venv/ as requirements.txt says,
# and sets venv. Wants Python 3.10+; `root` is the repository's.

venv=$root/.venv
requirements=$root/tests/clients/requirements.txt
if ! cmp -s "$requirements" "$venv/clients-requirements.txt"; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$venv/clients-requirements.txt"
fi
