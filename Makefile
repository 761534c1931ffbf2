# Everything runs through uv, which makes the environment when it is first needed.
export NO_MKDOCS_2_WARNING = 1
.PHONY: demo test test-slow gallery bench docs lint format

demo:  ## the main job, on the table that ships inside
	uv run bayeslens predict

test:
	uv run pytest

test-slow:
	uv run pytest -m slow --timeout=1800

gallery:  ## check every paper's claim and record the results
	uv run bayeslens gallery run

bench:  ## against peers; each prints a ratio
	for file in $$(grep -l '^if __name__' benchmarks/*.py); do uv run --extra bench python $$file || exit 1; done

docs:  ## build the site into site/; runs the tutorial
	uv run --group docs mkdocs build --strict

lint:
	uv run ruff check .
	uv run ruff format --check .
	uv run python .ci/constraints.py

format:
	uv run ruff check --fix .
	uv run ruff format .
