# nas with the tested set of packages; TORCH and PIP_INDEX_URL choose another build of torch:
#   docker build -t nas . && docker run --rm -v "$PWD:/work" nas run pydoc-1m/recipe
FROM python:3.11-slim
ARG TORCH="torch==2.13.0"
WORKDIR /src
COPY pyproject.toml constraints.txt MANIFEST.in README.md LICENSE CHANGELOG.md ./
COPY whittle_nas ./whittle_nas
RUN pip install --no-cache-dir "$TORCH" \
 && pip install --no-cache-dir -c constraints.txt . litserve \
 && rm -rf /src
WORKDIR /work
ENTRYPOINT ["nas"]
CMD ["--help"]
