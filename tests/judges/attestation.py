"""Verifies an attestation with the libraries of those who wrote DSSE and in-toto, which know nothing of
Daybook: its signature, that it is a Statement of version 1, and that what it is about can be named so.

Arguments: the file, and the public key as Daybook publishes it.
"""

import base64
import json
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

file, vkey = sys.argv[1:]
# A vkey of signed-note: the name, the key's id, and in Base64 the algorithm (1 is Ed25519) and the key.
_, keyid, encoded = vkey.split("+", 2)
algorithm, *public = base64.b64decode(encoded)
assert algorithm == 1, algorithm
key = SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes(public)), keyid=keyid)

with open(file, "rb") as signed:
    envelope = Envelope.from_dict(json.load(signed))
assert envelope.payload_type == "application/vnd.in-toto+json", envelope.payload_type
assert list(envelope.verify([key], 1)) == [keyid]

# What a Statement does not have is refused here.
statement = json_format.Parse(envelope.payload, statement_pb2.Statement())
Statement.copy_from_pb(statement).validate()
subjects = [dict(subject.digest) for subject in statement.subject]
print(json.dumps({"predicateType": statement.predicate_type, "subjects": subjects}))
