//! Why an image could not be built.

use std::io;

use crate::image::ImageError;

/// Why a build failed. Each has a stable [`code`](Self::code), a [`remedy`](Self::remedy) and an
/// answer to whether trying again may help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The service's folder is not in the source.
    #[error("the source has no folder {path:?}")]
    SourcePathMissing {
        /// The folder, as the service names it.
        path: String,
    },
    /// The path leads out of the source.
    #[error("the path {path:?} leads out of the source")]
    SourcePathEscapes {
        /// The path, as the service names it.
        path: String,
    },
    /// The source contains what cannot be packed.
    #[error("{path:?} cannot be packed: {reason}")]
    SourceRefused {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The build command does not exist.
    #[error("the build command's program {program:?} was not found")]
    CommandNotFound {
        /// Its name.
        program: String,
    },
    /// The build command failed.
    #[error("the build command `{command}` {how}{}", last_lines(.tail))]
    CommandFailed {
        /// The command.
        command: String,
        /// How it ended: "exited with 1", "was killed by signal 9".
        how: String,
        /// Its exit code, unless a signal killed it.
        exit_code: Option<i32>,
        /// The last lines that it printed.
        tail: Vec<String>,
    },
    /// Nothing in the source says how it is started.
    #[error("no start command was found; looked for {}", .looked_for.join(", "))]
    NoStartCommand {
        /// What was looked for, in order.
        looked_for: Vec<String>,
        /// What was found that may help, in whole sentences.
        hints: Vec<String>,
    },
    /// There is no Dockerfile where it should be.
    #[error("the source has no {path:?}")]
    DockerfileMissing {
        /// Its path within the service's folder.
        path: String,
    },
    /// No tool that builds a Dockerfile is here.
    #[error(
        "building a Dockerfile needs buildah, podman or docker, and none of them is usable here"
    )]
    BuilderMissing,
    /// The tool could not build the Dockerfile.
    #[error("{tool} could not build the Dockerfile: it {how}{}", last_lines(.tail))]
    DockerfileFailed {
        /// "buildah", "podman", "docker".
        tool: &'static str,
        /// How it ended.
        how: String,
        /// Its exit code, unless a signal killed it.
        exit_code: Option<i32>,
        /// The last lines that it printed: the failing step.
        tail: Vec<String>,
    },
    /// The base image cannot be used.
    #[error("the base image {reference} is not available")]
    BaseImageUnavailable {
        /// What was asked for.
        reference: String,
        /// Why not.
        source: Box<ImageError>,
    },
    /// The image could not be written.
    #[error("the image could not be written")]
    Image(#[from] ImageError),
    /// The file system refused.
    #[error("{doing} failed")]
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// It was told to stop.
    #[error("the build was cancelled")]
    Cancelled,
}

impl BuildError {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::SourcePathMissing { .. } => "source_path_missing",
            Self::SourcePathEscapes { .. } => "source_path_escapes",
            Self::SourceRefused { .. } => "source_refused",
            Self::CommandNotFound { .. } => "build_command_not_found",
            Self::CommandFailed { .. } => "build_command_failed",
            Self::NoStartCommand { .. } => "no_start_command",
            Self::DockerfileMissing { .. } => "dockerfile_missing",
            Self::BuilderMissing => "builder_missing",
            Self::DockerfileFailed { .. } => "dockerfile_build_failed",
            Self::BaseImageUnavailable { .. } => "base_image_unavailable",
            Self::Image(ImageError::Cancelled) | Self::Cancelled => "cancelled",
            Self::Image(error) => error.code(),
            Self::Io { .. } => "build_io_failed",
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::SourcePathMissing { .. } => {
                "Correct the service's source path, or push the folder to the branch that is deployed.".into()
            }
            Self::SourcePathEscapes { .. } => {
                "Use a relative path without `..` that stays within the repository, also through symbolic links.".into()
            }
            Self::SourceRefused { .. } => {
                "Remove the file from the repository or name it in .dockerignore.".into()
            }
            Self::CommandNotFound { program } => format!(
                "Install {program} on the machine of the build worker, or correct the service's build command."
            ),
            Self::CommandFailed { .. } => {
                "See the build's log for what the command printed, and run the same command in a clean checkout.".into()
            }
            Self::NoStartCommand { hints, .. } => {
                let mut remedy = hints.join(" ");
                if !remedy.is_empty() {
                    remedy.push(' ');
                }
                remedy.push_str("Add a Procfile with a line like `web: ./start --port $PORT`.");
                remedy
            }
            Self::DockerfileMissing { .. } => {
                "Add the Dockerfile, correct its path in the service, or choose the archive builder.".into()
            }
            Self::BuilderMissing => {
                "Install buildah (`apt install buildah`, `dnf install buildah`), podman or docker on the machine of the build worker, or choose the archive builder.".into()
            }
            Self::DockerfileFailed { .. } => {
                "Correct the step of the Dockerfile that failed; the build's log has all that it printed.".into()
            }
            Self::BaseImageUnavailable { source, .. } => source.remedy().into(),
            Self::Image(error) => error.remedy().into(),
            Self::Io { .. } => {
                "Check free space and permissions on the machine of the build worker, then try again.".into()
            }
            Self::Cancelled => "Start it again if it is still wanted.".into(),
        }
    }

    /// Whether the same build may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Io { .. } => true,
            Self::Image(error) => error.is_retryable(),
            Self::BaseImageUnavailable { source, .. } => source.is_retryable(),
            _ => false,
        }
    }

    /// For `map_err`: what was being done when the file system refused.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// The last lines of a command, for the end of a message.
fn last_lines(tail: &[String]) -> String {
    if tail.is_empty() {
        return "; it printed nothing".into();
    }
    format!("; its last lines:\n{}", tail.join("\n"))
}
