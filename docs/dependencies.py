"""What pip-licenses says in JSON, as a page. Run by `make sbom`."""

import json
import sys

HEAD = """# Dependencies and their licences

All that `make install` puts into `.venv`, in the versions of `constraints.txt`: the packages that
`pip install pangu-moe` and its extras need, and those of tests. As the packages declare it; written
by `make sbom`, which also leaves a CycloneDX list in `dist/sbom.json`. torch-npu (BSD) is
installed by the extra `npu` alone, Triton (MIT) by `cuda` or torch's CUDA wheel.

| package | version | licence |
|---|---|---|"""

print(HEAD)
for package in json.load(sys.stdin):
    if package["Name"] == "pangu-moe":
        continue
    licence, _, rest = package["License"].strip().partition("\n")  # some declare the whole text
    name = f"[{package['Name']}]({package['URL']})" if "//" in package["URL"] else package["Name"]
    print(f"| {name} | {package['Version']} | {licence}{' …' if rest else ''} |")
