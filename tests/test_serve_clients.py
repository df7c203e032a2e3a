"""Official clients and schemathesis against a server in a process of its own.

openai and cohere are of the extra `test`. langchain, llama-index and infinity's client are large:
their tests run where they are installed, or in the Python that ALIGN_JAX_CLIENTS_PYTHON names.
"""

import json
import os
import shutil
import subprocess
import sys

import httpx
import numpy as np
import pytest
from helpers import environment
from serve_helpers import encoded, picture, process, uri

import align_jax
from align_jax.search import ingest

pytestmark = pytest.mark.slow

TEXTS = ["a photo of a cat", "two red squares and circles on a mat", "x"]


@pytest.fixture(scope="module")
def model(tiny_hf):
    return align_jax.load(tiny_hf[0], batch_size=8)


@pytest.fixture(scope="module")
def url(tiny_hf, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for number in range(5):
        (folder / f"{number}.png").write_bytes(encoded(picture(number)))
    with align_jax.open_index(folder / "index", model) as index:
        ingest.add(index, model, str(folder / "*.png"))
    options = ("--index", "index", "--writable", "--batch-size", "4")
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    with process("--model", tiny_hf[0], *options, cwd=folder, cache=cache) as running:
        yield running[1]


@pytest.fixture(scope="module")
def openai():
    import openai  # seconds, which the collection of the quick tests need not wait for

    return openai


@pytest.fixture(scope="module")
def client(url, openai):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def expected(model):
    return model.encode_text(TEXTS), model.encode_image([picture(n) for n in range(3)])


def rows(answer):
    return np.array([one.embedding for one in answer.data])


def test_openai_texts_as_base64_and_as_numbers(client, expected):
    default = client.embeddings.create(model="align", input=TEXTS)  # base64, by default
    numbers = client.embeddings.create(model="align", input=TEXTS, encoding_format="float")
    np.testing.assert_allclose(rows(default), rows(numbers), atol=1e-7)
    np.testing.assert_allclose(rows(default), expected[0], atol=1e-6)
    assert default.usage.prompt_tokens > 0


def test_openai_images_mixed_inputs_and_messages(client, expected):
    z_text, z_image = expected
    create = client.embeddings.create
    images = [uri(number) for number in range(3)]
    np.testing.assert_allclose(rows(create(model="align", input=images)), z_image, atol=1e-6)
    by_modality = create(model="align", input=images, extra_body={"modality": "image"})
    np.testing.assert_allclose(rows(by_modality), z_image, atol=1e-6)
    mixed = create(model="align", input=[{"text": TEXTS[1]}, {"image": images[2]}, TEXTS[0]])
    np.testing.assert_allclose(rows(mixed), [z_text[1], z_image[2], z_text[0]], atol=1e-6)
    content = [{"type": "image_url", "image_url": {"url": images[1]}}]
    body = {"model": "align", "messages": [{"role": "user", "content": content}]}
    found = client.post("/embeddings", cast_to=dict, body=body)
    np.testing.assert_allclose(found["data"][0]["embedding"], z_image[1], atol=1e-6)


def test_openai_errors_and_models(client, openai):
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model="align", input=["a", {"image": "data:image/png;base64,AA"}])
    assert error.value.param == "input[1].image" and error.value.code == "invalid_image"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert [one.id for one in client.models.list()] == ["align"]


def test_cohere(url, expected):
    import cohere

    z_text, z_image = expected
    client = cohere.ClientV2(api_key="any", base_url=url)
    options = {"model": "align", "embedding_types": ["float"]}
    texts = client.embed(input_type="search_document", texts=TEXTS, **options)
    np.testing.assert_allclose(texts.embeddings.float_, z_text, atol=1e-6)
    image = client.embed(input_type="image", images=[uri(1)], **options)
    np.testing.assert_allclose(image.embeddings.float_, z_image[1:2], atol=1e-6)
    content = [
        {"content": [{"type": "text", "text": TEXTS[0]}]},
        {"content": [{"type": "image_url", "image_url": {"url": uri(2)}}]},
    ]
    both = client.embed(input_type="search_document", inputs=content, **options)
    np.testing.assert_allclose(both.embeddings.float_, [z_text[0], z_image[2]], atol=1e-6)


PROGRAMS = {
    "langchain_openai": """
from langchain_openai import OpenAIEmbeddings
client = OpenAIEmbeddings(model="align", base_url=url + "/v1", api_key="any", max_retries=0,
                          check_embedding_ctx_length=False)
found = client.embed_documents(texts)
""",
    "llama_index.embeddings.openai_like": """
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
client = OpenAILikeEmbedding(model_name="align", api_base=url + "/v1", api_key="any",
                             embed_batch_size=10, max_retries=0)
found = client.get_text_embedding_batch(texts)
""",
    "infinity_client": """
from infinity_client import Client
from infinity_client.api.default import embeddings
from infinity_client.models import OpenAIEmbeddingInputImage
body = {"model": "align", "input": images, "modality": "image"}
body = OpenAIEmbeddingInputImage.from_dict(body)
found = [one.embedding for one in embeddings.sync(client=Client(base_url=url), body=body).data]
""",
}


@pytest.mark.parametrize("module", PROGRAMS)
def test_other_clients_in_python(url, expected, module):
    python = os.environ.get("ALIGN_JAX_CLIENTS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"{module} is not installed")
    given = {"url": url, "texts": TEXTS, "images": [uri(n) for n in range(3)]}
    program = "import json, sys\nglobals().update(json.load(sys.stdin))\n" + PROGRAMS[module]
    program += "\nprint(json.dumps([list(map(float, row)) for row in found]))"
    run = subprocess.run(
        [python, "-c", program], input=json.dumps(given), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    wanted = expected["image" in PROGRAMS[module]]
    np.testing.assert_allclose(json.loads(run.stdout), wanted, atol=1e-6)


NODE = """
const OpenAI = require("openai");
const { url, texts, images } = JSON.parse(require("fs").readFileSync(0));
(async () => {
  const client = new OpenAI({ baseURL: url + "/v1", apiKey: "any", maxRetries: 0 });
  const answer = await client.embeddings.create({ model: "align", input: [...texts, ...images] });
  let param = "";
  await client.embeddings.create({ model: "align", input: [] }).catch((e) => (param = e.param));
  console.log(JSON.stringify({ rows: answer.data.map((one) => one.embedding), param }));
})();
"""


def test_openai_in_node(url, expected, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai@6"]
    if subprocess.run(install, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("npm cannot install openai")
    given = json.dumps({"url": url, "texts": TEXTS, "images": [uri(n) for n in range(3)]})
    run = subprocess.run(
        ["node", "-e", NODE], cwd=tmp_path, input=given, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    np.testing.assert_allclose(found["rows"], np.concatenate(expected), atol=1e-6)
    assert found["param"] == "input"


def test_token_ids_get_an_answer_that_helps(client, openai):
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="align", input=[[1, 2, 3]])


def test_schemathesis_finds_no_error_of_the_server_and_no_answer_outside_its_schema(url, tmp_path):
    found = shutil.which("schemathesis", path=os.path.dirname(sys.executable))
    (tmp_path / "schemathesis.toml").write_text(
        "[checks.negative_data_rejection]\nexpected-statuses = [400, 404, 405, 413, 415]\n"
    )
    assert httpx.get(f"{url}/openapi.json").json()["openapi"] == "3.1.0"
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,negative_data_rejection,unsupported_method"
    )
    run = subprocess.run(
        [
            *(found, "run", f"{url}/openapi.json", "--checks", checks, "--seed", "1"),
            *("--phases", "coverage,fuzzing", "--max-examples", "50", "--no-color"),
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    print(run.stdout[-1500:])
    assert run.returncode == 0, run.stdout[-8000:]
