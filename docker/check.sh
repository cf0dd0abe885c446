#!/usr/bin/env bash
# Runs the pip commands of docker/Dockerfile in a clean virtual environment: what can be checked without an engine.
#   docker/check.sh FOLDER [PIP OPTIONS]     for example --extra-index-url of PyTorch's CPU wheels
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "$1")
shift
mkdir -p "$folder/src"
python3 -m venv "$folder/venv"
cd "$folder/src"
while read -r word sources; do
    # What the images copy, but for the last word, which says where to.
    if [[ $word == COPY && $sources != --* ]]; then (cd "$root" && cp -r ${sources% *} "$folder/src"); fi
done < "$root/docker/Dockerfile"
"$folder/venv/bin/python" - "$root/docker/Dockerfile" > "$folder/commands" <<'PY'
import re
import sys

text = re.sub(r"\\\n\s*", "", open(sys.argv[1]).read())
for line in text.splitlines():
    if line.startswith("RUN "):
        for part in line[4:].split(" && "):
            if part.startswith(("pip ", "python3 -c")):
                print(part.replace("/src/", ""))
PY
cat "$folder/commands"
export PATH="$folder/venv/bin:$PATH" PIP_EXTRA_OPTIONS="$*"
while read -r command; do
    if [[ $command == pip* && $command != *--no-deps* ]]; then command="$command $PIP_EXTRA_OPTIONS"; fi
    bash -o pipefail -c "$command"
done < "$folder/commands"
for program in $(sed -n 's/^ENTRYPOINT \["\(.*\)"\]$/\1/p' "$root/docker/Dockerfile"); do "$program" --version; done
