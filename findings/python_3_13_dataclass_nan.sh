#!/bin/sh
# Python 3.13 and data classes. A field that holds NaN, math.nan on both sides, was equal up to 3.12, since == compared tuples of the fields
# and tuples take an object as equal to itself. 3.13 compares field by field, so that two records with the same NaN are unequal, and one
# would not guess that from a new Python: a copy by dataclasses.replace is another record than its original. Lists and tuples that hold
# the NaN are equal as before, inside data classes as well.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PY'
import dataclasses, math, sys


@dataclasses.dataclass
class Measured:
    name: str
    value: object


for name, value in (("NaN", math.nan), ("a list of NaN", [math.nan])):
    record = Measured("loss", value)
    since = "3.13 or later" if sys.version_info >= (3, 13) else "before 3.13"
    print(f"Python {since}, {name}: equal to its copy: {record == dataclasses.replace(record)}")
PY
for python in python3 python3.14 python3.13 python3.12 python3.11 "$(pyenv root 2>/dev/null || true)"/versions/3.1[0-9]*/bin/python3; do
  "$python" "$folder/show.py" 2>/dev/null >>"$folder/seen" || true
done
sort -u "$folder/seen"
grep -q "^Python 3.13 or later, " "$folder/seen" || { echo "Python 3.13 or later is needed"; exit 2; }
for other in "3.13 or later, NaN: equal to its copy: True" "before 3.13, NaN: equal to its copy: False" "a list of NaN: equal to its copy: False"; do
  if grep -q "$other" "$folder/seen"; then exit 1; fi
done
