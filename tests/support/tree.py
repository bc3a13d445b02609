"""The repository as data: its files, distributions and remote-code folders."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Distribution:
    """One installable project; `package` is its import folder."""

    project: Path
    package: Path

    @property
    def name(self) -> str:
        return self.project.name

    @property
    def import_name(self) -> str:
        return self.package.name

    @property
    def remote(self) -> Path:
        """The folder whose files travel to the Hub; need not exist."""
        return self.package / "remote"


def _distribution(project: Path) -> Distribution:
    (init,) = project.glob("src/*/__init__.py")
    return Distribution(project, init.parent)


DISTRIBUTIONS = [_distribution(path.parent) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
if (ROOT / "shared-kernels/pyproject.toml").is_file():
    DISTRIBUTIONS.append(_distribution(ROOT / "shared-kernels"))
IMPORT_NAMES = frozenset(each.import_name for each in DISTRIBUTIONS)


def repository_files() -> list[Path]:
    """Every file that is, or is about to be, under version control; in a plain copy, every file that is not hidden."""
    if not (ROOT / ".git").exists():
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        return [ROOT / name for name in sorted(names) if not any(part[0] in "._" for part in name.parts[:-1])]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in sorted(set(listed.split("\0")) - {""}) if (path := ROOT / name).is_file()]
