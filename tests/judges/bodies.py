# A pack of git is sent as bytes that are not looked into, as application/octet-stream is.
import schemathesis

schemathesis.serializer.alias("application/x-git-packed-objects", "application/octet-stream")
