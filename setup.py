"""What pyproject.toml cannot say: a wheel has conf/, which is at the top of the repository, as
disinhib/conf. In an editable install it stays where it is."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._configurations().items():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [str(file) for file in self._configurations().values()]
        return [*super().get_outputs(include_bytecode), *own]

    def get_source_files(self) -> list[str]:
        """What a source distribution has."""
        return [*super().get_source_files(), *(str(file) for file in self._configurations())]

    def _configurations(self) -> dict[Path, Path]:
        target = Path(self.build_lib or "", "disinhib")
        return {file: target / file for file in sorted(Path("conf").rglob("*.yaml"))}


setup(cmdclass={"build_py": BuildWithConfigurations})
