#!/bin/sh
# A pydantic model as query parameters (Annotated[Model, Query()]) in FastAPI before 0.148. Pydantic's model_fields_set holds the fields
# that were given, and so one tells a default from a value that is equal to it. One would guess that for a query it holds what the
# query has. It holds every field that has a default as well, whether the client sent it or not; for the same model as a JSON body it
# holds what was sent. A check such as "share needs towards" then refuses every request. 0.148 agrees with the body.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/show.py" <<'PY'
import warnings
from typing import Annotated

import fastapi
from fastapi import FastAPI, Query
from fastapi.testclient import TestClient
from pydantic import BaseModel

warnings.simplefilter("ignore")


class Wish(BaseModel):
    count: int = 1
    share: float = 0.5


app = FastAPI()


@app.get("/query")
def query(wish: Annotated[Wish, Query()]) -> list[str]:
    return sorted(wish.model_fields_set)


@app.post("/body")
def body(wish: Wish) -> list[str]:
    return sorted(wish.model_fields_set)


client = TestClient(app)
found = client.get("/query?count=2").json(), client.post("/body", json={"count": 2}).json()
print(fastapi.__version__, "query:", *found[0], "body:", *found[1])
PY
for version in 0.147.0 0.148.0; do
  "$folder/venv/bin/pip" install --quiet "fastapi==$version" starlette==1.10.0 pydantic==2.14.4 httpx==0.28.1
  "$folder/venv/bin/python" -W ignore "$folder/show.py" | tee -a "$folder/seen"
done
grep -qx "0.147.0 query: count share body: count" "$folder/seen"
grep -qx "0.148.0 query: count body: count" "$folder/seen"
