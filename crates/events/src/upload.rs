//! Sources that were uploaded: the content of a folder, as a commit that no other repository has.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::Refusal;
use crate::names::{CommitId, ProjectName, RepositoryUrl, ServiceName};

/// The content of a folder was uploaded as a commit without parents, from which a service can be
/// deployed. By whom is in the envelope; the commit's own author is what the uploader says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SourceUploaded {
    /// The service that it is for.
    pub service: ServiceName,
    /// The commit.
    pub commit: CommitId,
    /// The id of its tree: the same content has the same.
    pub tree: CommitId,
    /// How many bytes were sent for it, compressed. What was there already was not sent again.
    pub bytes: u64,
}

/// Refuses a repository that is Daybook's own: what was uploaded is deployed by naming the commit,
/// and only to the service that it was uploaded for.
pub fn refuse_as_source(url: &RepositoryUrl) -> Result<(), Refusal> {
    if url.is_on_uploads() {
        return Err(Refusal::new(
            "source_is_uploads",
            format!("{url} stands for what is uploaded to Daybook, and is no repository"),
            "leave the source out; `daybook deploy --from DIR` uploads a folder and deploys it",
        ));
    }
    Ok(())
}

/// Refuses a version that was uploaded for another service.
pub fn check_owner(
    url: &RepositoryUrl,
    project: &ProjectName,
    service: &ServiceName,
) -> Result<(), Refusal> {
    if url.is_on_uploads() && *url != RepositoryUrl::of_uploads(project, service) {
        return Err(Refusal::new(
            "upload_of_another_service",
            format!("{url} was not uploaded for the service {service} of {project}"),
            "upload the folder for this service",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uploads_are_deployed_to_the_service_that_they_are_for_and_are_nobodys_source() {
        let (shop, bank) = ("shop".parse().unwrap(), "bank".parse().unwrap());
        let (web, api) = ("web".parse().unwrap(), "api".parse().unwrap());
        let url = RepositoryUrl::of_uploads(&shop, &web);
        assert_eq!(url.as_str(), "https://uploads.daybook/shop/web.git");
        assert_eq!(RepositoryUrl::parse(url.as_str()).unwrap(), url);
        assert_eq!(url.uploads_for(), Some((shop.clone(), web.clone())));
        check_owner(&url, &shop, &web).unwrap();
        assert!(check_owner(&url, &shop, &api).is_err());
        assert!(check_owner(&url, &bank, &web).is_err());

        let mine = |text: &str| RepositoryUrl::parse(text).unwrap();
        for disguised in [
            "https://uploads.daybook/shop/web.git",
            "https://UPLOADS.daybook/shop/web.git",
            "http://uploads.daybook:80/shop/web",
            "https://uploads.daybook./bank/web.git",
            "ssh://git@uploads.daybook/shop/web.git",
        ] {
            let refused = refuse_as_source(&mine(disguised)).unwrap_err();
            assert_eq!(refused.code, "source_is_uploads", "{disguised}");
        }
        for other in [
            "https://git.example/shop/web.git",
            "https://uploads.daybook.example/shop/web.git",
            "/srv/git/uploads.daybook/shop",
        ] {
            refuse_as_source(&mine(other)).unwrap();
            assert_eq!(mine(other).uploads_for(), None, "{other}");
            check_owner(&mine(other), &shop, &web).unwrap();
        }
    }
}
