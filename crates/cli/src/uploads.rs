//! Sources that are uploaded: where a node keeps them, and where it fetches those of others.

use std::path::{Path, PathBuf};

use clap::Args;
use daybook_api::uploads::UploadSettings;
use daybook_events::with_causes;
use daybook_workers::git_transport::HostCredential;
use daybook_workers::source::UploadedSources;

use crate::exit::{Code, Failure};

/// The folder of uploads, in the data folder.
const FOLDER: &str = "uploads";

/// Options for sources that are uploaded.
#[derive(Debug, Clone, Default, Args)]
pub struct UploadArgs {
    /// The most that one upload of a source may have, compressed, in MiB: 100 if not given.
    #[arg(long, env = "DAYBOOK_UPLOAD_MAX_MIB", value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub upload_max_mib: Option<u64>,
    /// The most that all uploads of one project may take on disk, in MiB: 10240 if not given.
    #[arg(long, env = "DAYBOOK_UPLOADS_PROJECT_MAX_MIB", value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=16_777_216))]
    pub uploads_project_max_mib: Option<u64>,
    /// Where sources that were uploaded are fetched by builds in clusters, and by workers that do not
    /// share the data folder: the HTTP interface of this Daybook as they reach it, such as
    /// https://daybook.example.com.
    #[arg(long, env = "DAYBOOK_UPLOADS_URL", value_name = "URL")]
    pub uploads_url: Option<String>,
    /// The token for that, of the role `deployer`: a file with the line `https://USER:TOKEN@HOST`, as
    /// `git credential-store` keeps it. For builds in clusters it is in --build-git-secret.
    #[arg(
        long,
        env = "DAYBOOK_UPLOADS_CREDENTIALS",
        value_name = "FILE",
        requires = "uploads_url"
    )]
    pub uploads_credentials: Option<PathBuf>,
}

impl UploadArgs {
    /// How a server keeps them.
    pub fn kept(&self, data: &Path) -> UploadSettings {
        let mut settings = UploadSettings::new(data.join(FOLDER));
        if let Some(mib) = self.upload_max_mib {
            settings.max_bytes = mib << 20;
        }
        if let Some(mib) = self.uploads_project_max_mib {
            settings.project_max_bytes = mib << 20;
        }
        settings
    }

    /// Where workers read them.
    pub fn read(&self, data: &Path) -> Result<UploadedSources, Failure> {
        let here = UploadedSources::in_folder(data.join(FOLDER));
        let credentials = match &self.uploads_credentials {
            None => Vec::new(),
            Some(path) => HostCredential::read_file(path).map_err(|e| {
                Failure::new(Code::Usage, "uploads_credentials_unusable", with_causes(&e))
                    .hint("write the line https://USER:TOKEN@HOST into it")
            })?,
        };
        let Some(url) = &self.uploads_url else {
            return Ok(here);
        };
        here.or_from(url, credentials).map_err(|e| {
            Failure::new(Code::Usage, e.code, e.to_string())
                .hint("give --uploads-url the form https://HOST[:PORT]")
        })
    }
}
