//! What can keep a release from being ready, and what that usually comes of.

use std::fmt;

/// Why a release is not as it is to be, in the field's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// Its image cannot be had.
    ImagePullBackOff,
    /// It ends again and again.
    CrashLoopBackOff,
    /// It used more memory than it may.
    OomKilled,
    /// No node takes it.
    Unschedulable,
    /// It runs, and does not answer that it is ready.
    ReadinessProbeFailed,
    /// It has not answered since it was started.
    StartupProbeFailed,
    /// It does not answer any more, and is started again.
    LivenessProbeFailed,
    /// A ConfigMap or a Secret is missing, or a key of it.
    CreateContainerConfigError,
    /// Its command cannot be run.
    StartError,
    /// A volume cannot be mounted.
    FailedMount,
    /// A volume cannot be had by the node.
    FailedAttachVolume,
    /// Its node had no more room for it.
    Evicted,
    /// The namespace may not use as much.
    QuotaExceeded,
    /// No pod of it can be made.
    FailedCreate,
    /// It made no progress, and nothing says why.
    ProgressDeadlineExceeded,
    /// Somebody has changed it.
    Drift,
    /// A volume cannot be made as large as it is to be.
    VolumeNotEnlarged,
    /// Argo CD finds something wrong.
    Degraded,
    /// Argo CD has not come to it yet.
    SyncPending,
    /// Argo CD could not apply it.
    SyncFailed,
    /// A secret that it uses has no value.
    SecretMissing,
    /// The values of its secrets cannot be read.
    SecretsUnusable,
    /// Another process has its port.
    PortInUse,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::ImagePullBackOff,
        Self::CrashLoopBackOff,
        Self::OomKilled,
        Self::Unschedulable,
        Self::ReadinessProbeFailed,
        Self::StartupProbeFailed,
        Self::LivenessProbeFailed,
        Self::CreateContainerConfigError,
        Self::StartError,
        Self::FailedMount,
        Self::FailedAttachVolume,
        Self::Evicted,
        Self::QuotaExceeded,
        Self::FailedCreate,
        Self::ProgressDeadlineExceeded,
        Self::Drift,
        Self::VolumeNotEnlarged,
        Self::Degraded,
        Self::SyncPending,
        Self::SyncFailed,
        Self::SecretMissing,
        Self::SecretsUnusable,
        Self::PortInUse,
    ];

    /// The cause as one word: a stable code.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ImagePullBackOff => "ImagePullBackOff",
            Self::CrashLoopBackOff => "CrashLoopBackOff",
            Self::OomKilled => "OOMKilled",
            Self::Unschedulable => "Unschedulable",
            Self::ReadinessProbeFailed => "ReadinessProbeFailed",
            Self::StartupProbeFailed => "StartupProbeFailed",
            Self::LivenessProbeFailed => "LivenessProbeFailed",
            Self::CreateContainerConfigError => "CreateContainerConfigError",
            Self::StartError => "StartError",
            Self::FailedMount => "FailedMount",
            Self::FailedAttachVolume => "FailedAttachVolume",
            Self::Evicted => "Evicted",
            Self::QuotaExceeded => "QuotaExceeded",
            Self::FailedCreate => "FailedCreate",
            Self::ProgressDeadlineExceeded => "ProgressDeadlineExceeded",
            Self::Drift => "Drift",
            Self::VolumeNotEnlarged => "VolumeNotEnlarged",
            Self::Degraded => "Degraded",
            Self::SyncPending => "SyncPending",
            Self::SyncFailed => "SyncFailed",
            Self::SecretMissing => "SecretMissing",
            Self::SecretsUnusable => "SecretsUnusable",
            Self::PortInUse => "PortInUse",
        }
    }

    /// What it usually comes of, the most likely first.
    pub fn likely_causes(self) -> &'static [&'static str] {
        match self {
            Self::ImagePullBackOff => &[
                "The image or its tag is not in the registry: a wrong name, or it was deleted.",
                "The registry refuses the cluster: no credentials, or expired ones.",
                "The node does not reach the registry, or the registry limits its requests.",
            ],
            Self::CrashLoopBackOff => &[
                "The application ends with an error while it starts: see its last lines.",
                "A variable or a secret that it needs is missing or wrong.",
                "A database or another service that it needs as it starts does not answer.",
            ],
            Self::OomKilled => &[
                "The memory limit is lower than what the application needs.",
                "The application uses more and more memory.",
                "Its runtime takes the memory of the node for its own, and not the limit.",
            ],
            Self::Unschedulable => &[
                "No node has as much cpu or memory left as an instance requests.",
                "Taints, a node selector or a volume leave no node for it.",
                "The cluster adds nodes by itself, and the next one is not there yet.",
            ],
            Self::ReadinessProbeFailed => &[
                "The application listens on another port, or on localhost only.",
                "The health path does not exist, or answers with an error.",
                "The application still waits for something that it needs, such as a database.",
            ],
            Self::StartupProbeFailed => &[
                "The application takes longer to start than its deadline.",
                "The application listens on another port, or on localhost only.",
                "The health path does not exist, or answers with an error.",
            ],
            Self::LivenessProbeFailed => &[
                "The application hangs, or has too little cpu to answer in time.",
                "Somebody has added a liveness probe that asks too much.",
            ],
            Self::CreateContainerConfigError => &[
                "A ConfigMap or a Secret that the pod names is not there, or was deleted.",
                "It is there and has no such key.",
            ],
            Self::StartError => &[
                "The program that the command names is not in the image, or cannot be executed.",
                "The image was built for another architecture.",
            ],
            Self::FailedMount => &[
                "The claim, the Secret or the ConfigMap of the volume is not there.",
                "The volume is still in use on another node.",
                "The node's storage driver fails.",
            ],
            Self::FailedAttachVolume => &[
                "The volume is still attached to another node.",
                "The volume is in another zone than the node.",
                "The node has as many volumes as it can have.",
            ],
            Self::Evicted => &[
                "The node ran out of memory or of disk space.",
                "The pod wrote more than its node or its limit of storage allows.",
            ],
            Self::QuotaExceeded => &[
                "What runs in the namespace already takes what its ResourceQuota allows.",
                "A rollout runs an instance more than the service has, and there is no room for it.",
            ],
            Self::FailedCreate => &[
                "An admission webhook or policy refuses the pod.",
                "A LimitRange does not allow what it requests.",
                "The service account that it names is not there.",
            ],
            Self::ProgressDeadlineExceeded => &[
                "The application takes longer to become ready than its deadline.",
                "The cluster is overloaded, or its controllers do not run.",
            ],
            Self::Drift => &[
                "Somebody has changed the object by hand.",
                "A controller or an admission webhook changes it.",
            ],
            Self::VolumeNotEnlarged => &[
                "Its StorageClass does not allow volumes to grow.",
                "A ResourceQuota leaves no more storage.",
            ],
            Self::Degraded => {
                &["An object of the Application has failed: a rollout, an autoscaler or a claim."]
            }
            Self::SyncPending => &[
                "Argo CD has much to do, or its application controller does not run.",
                "Its repo server does not reach the GitOps repository, or may not read it.",
            ],
            Self::SyncFailed => &[
                "The API server or an admission webhook refuses an object.",
                "Argo CD may not write objects of this kind in this namespace.",
            ],
            Self::SecretMissing => &[
                "The secret was deleted, or never set in this scope.",
                "The secret store is another one than that in which it was set.",
            ],
            Self::SecretsUnusable => {
                &["The secret store cannot be read, or its key is another one."]
            }
            Self::PortInUse => &[
                "Another process on this machine listens on the port.",
                "An instance of before has not ended yet.",
            ],
        }
    }

    /// What can be done about it beside what is said of the single case.
    pub fn remedies(self) -> &'static [&'static str] {
        match self {
            Self::ImagePullBackOff => &[
                "Deploy a version whose image exists, or build it again.",
                "Give the cluster's service account image pull secrets for the registry.",
            ],
            Self::CrashLoopBackOff => &[
                "Look at what it printed: `daybook logs`.",
                "Correct a variable with `daybook config set`.",
                "Go back to what ran before: `daybook rollback`.",
            ],
            Self::OomKilled => &[
                "Give the service more memory (`--memory-limit`) and deploy again.",
                "Have the application's runtime keep to a part of the limit.",
            ],
            Self::Unschedulable => &[
                "Request less cpu or memory for the service, or run fewer instances.",
                "Add nodes, or stop what is not needed.",
            ],
            Self::ReadinessProbeFailed | Self::StartupProbeFailed => &[
                "Listen on the port in the variable PORT, on all addresses.",
                "Correct the health path of the service, or raise its deadline.",
            ],
            Self::LivenessProbeFailed => &["Give it more cpu, or take the liveness probe out."],
            Self::CreateContainerConfigError => {
                &["Deploy again: Daybook makes the ConfigMap and the Secret of a release anew."]
            }
            Self::StartError => &[
                "Correct the command of the service, or leave it out to use the image's own.",
                "Build the image for the architecture of the nodes.",
            ],
            Self::FailedMount | Self::FailedAttachVolume => &[
                "Wait until the pod that used the volume before is gone, or delete it.",
                "Look at the claim: kubectl describe pvc.",
            ],
            Self::Evicted => &["Request as much memory and storage as it really uses."],
            Self::QuotaExceeded => &[
                "Request less for the service, or run fewer instances.",
                "Stop or terminate deployments that are not needed.",
            ],
            Self::FailedCreate => {
                &["Ask who looks after the policy for an exception, or keep to it."]
            }
            Self::ProgressDeadlineExceeded => {
                &["Raise the deadline of the service (`--health-deadline`) and deploy again."]
            }
            Self::Drift => {
                &["Deploy again: with Argo CD, or once the other manager lets go of the fields."]
            }
            Self::VolumeNotEnlarged => &["Use a volume of another name, and copy what is kept."],
            Self::Degraded => &["Look at the objects of the environment: kubectl get all."],
            Self::SyncPending => &["Look at the Application in Argo CD, and refresh it."],
            Self::SyncFailed => &["Allow the namespace and the kind in the AppProject."],
            Self::SecretMissing | Self::SecretsUnusable => {
                &["Set the secret again: `daybook secret set`."]
            }
            Self::PortInUse => {
                &["End what listens there, or let the service use the port that it is given."]
            }
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::target::Problem;

    #[test]
    fn each_cause_has_a_word_of_its_own_what_it_comes_of_and_what_helps() {
        let words: BTreeSet<_> = Cause::ALL.iter().map(|cause| cause.as_str()).collect();
        assert_eq!(words.len(), Cause::ALL.len());
        for cause in Cause::ALL {
            let sentences = cause.likely_causes().iter().chain(cause.remedies());
            for sentence in sentences {
                assert!(sentence.ends_with('.'), "{cause}: {sentence}");
                assert!(!sentence.contains('\n'), "{cause}: {sentence}");
            }
            assert!(!cause.likely_causes().is_empty(), "{cause}");
            let problem = Problem::new(cause, "It is so.", "Do this.", true);
            assert_eq!(problem.reason, cause.to_string());
            assert_eq!(problem.remedies[0], problem.remedy);
            assert!(problem.remedies.len() > 1, "{cause}");
        }
        let other = Problem::other("NodeAffinity", "It is so.", "Do this.", true);
        assert!(other.likely_causes.is_empty() && other.remedies == ["Do this."]);
    }
}
