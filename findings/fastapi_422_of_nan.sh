#!/bin/sh
# A JSON body with NaN (or 1e999, or half of a surrogate pair) where a field is wrong: FastAPI answers 500 with a traceback in the
# log, not 422. Its answer to an invalid request echoes the input, and what Python's JSON reader takes, Starlette's JSON answer
# refuses to write. One would guess that whatever fails validation is the client's fault and ends as 422.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fastapi==0.165.0 starlette==1.10.0 pydantic==2.14.4 httpx==0.28.1
cat > "$folder/check.py" <<'PY'
import sys
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

app = FastAPI()


class Ask(BaseModel):
    n: int


@app.post("/")
def answer(ask: Ask) -> int:
    return ask.n


client = TestClient(app, raise_server_exceptions=False)
print("fastapi", version("fastapi"), "starlette", version("starlette"), "pydantic", version("pydantic"))
found = {}
for body in ('{"n": "x"}', '{"n": 1.5}', '{"n": NaN}', '{"n": 1e999}', '{"n": "\\ud800"}'):
    found[body] = client.post("/", content=body, headers={"content-type": "application/json"}).status_code
    print(f"{body:16} {found[body]}")
sys.exit(list(found.values()) != [422, 422, 500, 500, 500])
PY
"$folder/venv/bin/python" "$folder/check.py"
