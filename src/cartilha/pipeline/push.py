"""`push`: a run's trained model onto the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass

from cartilha.config import PushConfig
from cartilha.errors import UserError, log
from cartilha.hub import ask, fault
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.runs.files import run_directory

# What `train` writes into RUN/model; other files there stay on this machine.
PUSHED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "README.md")
REFUSALS = {
    401: "The hub does not accept this token; run `hf auth login` with one that may write.",
    403: "This account may not write to {name}; use a name of its own and a token that may write.",
}


@dataclass(frozen=True)
class PushResult(Result):
    """Where the model is now."""

    url: str
    private: bool
    commit: str


def push(config: PushConfig) -> PushResult:
    """Upload RUN/model; a UserError says that there is none, or that the hub refuses it or cannot be reached.

    A new repository is private unless `--public` is given; an existing one keeps its visibility.
    """
    preflight(config)
    folder = run_directory(config.run) / "model"
    num_bytes = sum(path.stat().st_size for pattern in PUSHED for path in folder.glob(pattern))
    size = f"{num_bytes / 1e6:,.1f} MB"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()

    def upload() -> PushResult:
        repository = api.create_repo(config.name, private=not config.public, exist_ok=True)
        private = bool(api.repo_info(repository.repo_id).private)
        log.info("Uploading %s (%s) to %s (%s)", folder, size, repository, "private" if private else "public")
        sent = api.upload_folder(
            folder_path=folder,
            repo_id=repository.repo_id,
            allow_patterns=list(PUSHED),
            commit_message="A model trained on with Cartilha",
        )
        return PushResult(str(repository), private, sent.oid)

    try:
        return ask(upload)
    except HFValidationError as error:
        raise UserError(f"{config.name!r} is not a name on the hub; use USER/NAME, such as ana/opt-pt.") from error
    except LocalTokenNotFoundError as error:
        raise UserError("The hub does not know who you are; run `hf auth login` once, or set HF_TOKEN.") from error
    except Exception as error:
        if (reason := fault(error)) is not None:
            raise UserError(f"The model was not uploaded: {reason}; nothing is lost, push again.") from error
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            other = "The hub refused {name} (HTTP {status}); nothing is lost, push again later."
            raise UserError(REFUSALS.get(status, other).format(name=config.name, status=status)) from error
        raise UserError(f"The hub cannot be reached ({type(error).__name__}); nothing is lost, push again.") from error
