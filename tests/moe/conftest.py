from pangu import backends

backends.select("cpu")
