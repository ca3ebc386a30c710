"""Judges an OpenAPI document by the JSON Schema that the OpenAPI Initiative publishes for its version, and
by what that cannot say: references that lead somewhere, parameters of paths, schemas and defaults.

Argument: the file.
"""

import json
import sys

from openapi_spec_validator import OpenAPIV31SpecValidator

with open(sys.argv[1], "rb") as document:
    document = json.load(document)
assert document["openapi"].startswith("3.1."), document["openapi"]
faults = list(OpenAPIV31SpecValidator(document).iter_errors())
for fault in faults[:20]:
    print("/".join(map(str, fault.absolute_path)), fault.message, file=sys.stderr)
sys.exit(1 if faults else 0)
