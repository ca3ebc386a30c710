//! Sources that were uploaded to Daybook itself.
//!
//! The ledger names them by a host that no name server knows ([`RepositoryUrl::of_uploads`]). A
//! worker that shares the data folder of a server reads them there; any other one fetches them over
//! that server's HTTP interface, with a credential of its own. Which of the two an operator chose is
//! in no event.

use std::path::{Path, PathBuf};

use daybook_events::{InvalidName, RepositoryUrl};
use git2::{Oid, Repository};
use url::Url;

use super::SourceError;
use crate::git_transport::{GitTransport, HostCredential, SourcePolicy, TransportConfig};

/// Where what was uploaded is to be had.
#[derive(Debug, Clone, Default)]
pub struct UploadedSources {
    folder: Option<PathBuf>,
    server: Option<(RepositoryUrl, GitTransport)>,
}

impl UploadedSources {
    /// In the folder that servers on this machine, or on a shared volume, keep uploads in.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
            server: None,
        }
    }

    /// What is not in the folder is fetched from the server with this address, such as
    /// `https://daybook.example.com`. It may be at a private address and without TLS: whoever names it
    /// knows. A credential without TLS is only sent if its line says so.
    ///
    /// # Errors
    /// If this is no http or https URL.
    pub fn or_from(
        mut self,
        server: &str,
        credentials: Vec<HostCredential>,
    ) -> Result<Self, InvalidName> {
        let url = RepositoryUrl::parse(server.trim_end_matches('/'))?;
        let mut config = TransportConfig::with_policy(SourcePolicy {
            allow_local_paths: false,
            ..SourcePolicy::trusting()
        });
        config.credentials = credentials;
        self.server = Some((url, GitTransport::new(config)));
        Ok(self)
    }

    /// Where a repository of uploads is read, and how: one that has the commit, if that is known.
    /// None if it is no repository of uploads.
    pub(super) fn locate(
        &self,
        url: &RepositoryUrl,
        commit: Option<Oid>,
    ) -> Result<Option<(RepositoryUrl, GitTransport)>, SourceError> {
        let Some((project, service)) = url.uploads_for() else {
            return Ok(None);
        };
        let out_of_reach = || SourceError::UploadOutOfReach { url: url.clone() };
        let folder = self.folder.as_ref();
        let folder = folder.map(|f| f.join(project.as_str()).join(format!("{service}.git")));
        if let Some(folder) = folder.filter(|folder| has(folder, commit)) {
            let config = TransportConfig::with_policy(SourcePolicy {
                allow_local_paths: true,
                ..SourcePolicy::default()
            });
            let here = Url::from_file_path(&folder).ok();
            let here = here.and_then(|here| RepositoryUrl::parse(here.as_str()).ok());
            return match here {
                Some(here) => Ok(Some((here, GitTransport::new(config)))),
                None => Err(out_of_reach()),
            };
        }
        let (server, transport) = self.server.as_ref().ok_or_else(out_of_reach)?;
        let there = address_of_uploads(server.as_str(), url);
        let there = there.and_then(|there| RepositoryUrl::parse(there).ok());
        let there = there.ok_or_else(out_of_reach)?;
        Ok(Some((there, transport.clone())))
    }
}

/// Where a server gives out uploads, for whoever may deploy; none if the URL is not one of uploads.
pub fn address_of_uploads(server: &str, url: &RepositoryUrl) -> Option<String> {
    let (project, service) = url.uploads_for()?;
    let server = server.trim_end_matches('/');
    Some(format!("{server}/uploads/{project}/{service}.git"))
}

/// Whether a repository is there and has the commit, if one is asked for.
fn has(folder: &Path, commit: Option<Oid>) -> bool {
    Repository::open_bare(folder)
        .is_ok_and(|repository| commit.is_none_or(|id| repository.find_commit(id).is_ok()))
}
