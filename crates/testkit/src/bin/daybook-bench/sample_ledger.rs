//! A ledger to fold: what one project's life leaves behind. Services are deployed again and again,
//! each deployment is built, committed, observed, switched to, and in the end stopped and removed
//! when a newer one has taken over. Every event is legal where it stands.

use std::collections::{BTreeMap, HashMap, VecDeque};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::build::{self, BuildEvent, LogSeal};
use daybook_events::deployment::{self, DeploymentEvent, SourceCommit, SwitchMode, Version};
use daybook_events::envelope::{Actor, Context, NewEvent, Payload};
use daybook_events::environment::{self, EnvironmentEvent, EnvironmentSpec};
use daybook_events::gitops::{self, Change, GitopsEvent};
use daybook_events::project::{self, ProjectEvent};
use daybook_events::routing::{
    self, Backend, MainChange, RouteChange, RoutingEvent, Stickiness, SwitchReason,
};
use daybook_events::spec::{BuildSpec, PinnedImage, RunSpec, ServiceSpec, SourceSpec};
use daybook_events::{
    BuildId, ClusterName, CommitId, DeploymentId, Digest, EnvironmentName, EventId, GitRef,
    Hostname, ImageRepository, ImageTag, InstanceRef, InvalidName, ProjectName, RepositoryUrl,
    ServiceName, Subject,
};
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::Failure;

const SERVICES: [&str; 4] = ["api", "web", "worker", "admin"];
/// What commits are signed with.
const SIGNER: &str = "SHA256:mVPwvezndPv/ARoIadVY98vAC0g+P/5633yTC4d/wXE";

/// An event, ready to be appended after those before it.
pub(crate) struct Sample {
    pub(crate) subject: Subject,
    pub(crate) id: EventId,
    pub(crate) bytes: Bytes,
}

/// The events of one project, as many as one asks for.
pub(crate) struct SampleProject {
    project: ProjectName,
    environment: EnvironmentName,
    cluster: ClusterName,
    now: Timestamp,
    counter: u64,
    table: u32,
    /// The newest commit of its repository, and how many there are.
    head: Option<CommitId>,
    commits: u64,
    revisions: HashMap<Subject, u32>,
    instances: Vec<Instance>,
    ready: VecDeque<Sample>,
}

/// One service with the deployments that it has.
struct Instance {
    instance: InstanceRef,
    source: RepositoryUrl,
    images: ImageRepository,
    hostname: Hostname,
    main: Option<Live>,
}

/// A deployment that runs.
#[derive(Clone)]
struct Live {
    id: DeploymentId,
    subject: Subject,
}

impl SampleProject {
    /// The project with this number.
    pub(crate) fn new(number: usize) -> Result<Self, Failure> {
        let project = ProjectName::parse(format!("shop-{number}"))?;
        let environment = EnvironmentName::parse("production")?;
        let instances = SERVICES
            .map(|name| {
                let service = ServiceName::parse(name)?;
                Ok::<_, InvalidName>(Instance {
                    source: RepositoryUrl::parse(format!(
                        "https://git.example/{project}/{service}.git"
                    ))?,
                    images: ImageRepository::parse(format!(
                        "registry.example/{project}/{service}"
                    ))?,
                    hostname: Hostname::parse(format!("{service}.{project}.example.org"))?,
                    instance: InstanceRef {
                        project: project.clone(),
                        environment: environment.clone(),
                        service,
                    },
                    main: None,
                })
            })
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let mut sample = Self {
            project,
            environment,
            cluster: ClusterName::parse("west")?,
            now: Timestamp::from_second(1_750_000_000)?,
            counter: 0,
            table: 0,
            head: None,
            commits: 1,
            revisions: HashMap::new(),
            instances,
            ready: VecDeque::new(),
        };
        sample.found()?;
        Ok(sample)
    }

    /// The next event.
    pub(crate) fn next(&mut self) -> Result<Sample, Failure> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let turn = self.counter as usize % self.instances.len();
            self.deploy(turn)?;
        }
    }

    /// The project, its services, its environment and its repository.
    fn found(&mut self) -> Result<(), Failure> {
        let run = Uuid::now_v7();
        let project = Subject::Project(self.project.clone());
        let created = project::Created {
            name: self.project.clone(),
            description: Some("sells things".into()),
        };
        self.record(&project, run, ProjectEvent::Created(created))?;
        for turn in 0..self.instances.len() {
            let Instance {
                instance,
                source,
                images,
                ..
            } = &self.instances[turn];
            let defined = project::ServiceDefined {
                name: instance.service.clone(),
                spec: ServiceSpec {
                    source: Some(SourceSpec {
                        url: source.clone(),
                        default_ref: GitRef::parse("main")?,
                        path: String::new(),
                    }),
                    image_repository: Some(images.clone()),
                    ..ServiceSpec::default()
                },
            };
            self.record(
                &project,
                run,
                ProjectEvent::ServiceDefined(Box::new(defined)),
            )?;
        }
        let environment = Subject::Environment(self.project.clone(), self.environment.clone());
        let created = environment::Created {
            project: self.project.clone(),
            name: self.environment.clone(),
            spec: EnvironmentSpec {
                clusters: vec![self.cluster.clone()],
                live: true,
                ..EnvironmentSpec::default()
            },
            from: None,
            auto_deploy: None,
        };
        self.record(&environment, run, EnvironmentEvent::Created(created))?;
        let commit = self.commit_id()?;
        self.head = Some(commit.clone());
        let created = gitops::RepositoryCreated {
            commit,
            branch: "main".into(),
        };
        let gitops = Subject::Gitops(self.project.clone());
        self.record(&gitops, run, GitopsEvent::RepositoryCreated(created))
    }

    /// One deployment from request to success, and the end of the one before it.
    fn deploy(&mut self, turn: usize) -> Result<(), Failure> {
        self.counter += 1;
        let id = DeploymentId(Uuid::now_v7());
        let run = id.0;
        let subject = Subject::Deployment(self.project.clone(), self.environment.clone(), id);
        let source = self.instances[turn].source.clone();
        let instance = self.instances[turn].instance.clone();
        self.record(
            &subject,
            run,
            DeploymentEvent::Requested(Box::new(deployment::Requested {
                instance: instance.clone(),
                version: Version::Git {
                    url: source.clone(),
                    git_ref: GitRef::parse("main")?,
                    path: String::new(),
                },
                clusters: vec![self.cluster.clone()],
                build: BuildSpec::default(),
                image_repository: Some(self.instances[turn].images.clone()),
                run: RunSpec::default(),
                switch: SwitchMode::Automatic,
                reason: Some(format!("release {} of {instance}", self.counter)),
                redeploy_of: None,
                promoted_from: None,
                allow_partial: false,
                config: Default::default(),
                secrets: BTreeMap::new(),
            })),
        )?;
        self.record(
            &subject,
            run,
            DeploymentEvent::Queued(deployment::Queued {}),
        )?;
        let cloning = deployment::CloningStarted {
            worker: "build-1".into(),
        };
        self.record(&subject, run, DeploymentEvent::CloningStarted(cloning))?;
        let commit = SourceCommit {
            commit: self.commit_id()?,
            message: format!("Fix rounding of totals, part {}", self.counter),
            author_name: "A. Developer".into(),
            author_email: "a.developer@example.org".into(),
            committed_at: self.now,
            url: source.to_string(),
        };
        let (image, build) = self.build(turn, run, &subject, commit)?;
        let pinned = deployment::ImagePinned {
            image,
            build: Some(build),
            shared: false,
        };
        self.record(&subject, run, DeploymentEvent::ImagePinned(pinned))?;

        let service = instance.service.clone();
        let deploy = Change::Deploy {
            service: service.clone(),
            deployment: id,
            from: None,
        };
        let commit = self.committed(run, "deploy", &service, deploy)?;
        let deploying = deployment::DeployingStarted {
            commit: commit.clone(),
        };
        self.record(&subject, run, DeploymentEvent::DeployingStarted(deploying))?;
        for ready in [false, true] {
            let observed = self.observed(&commit, Some(ready));
            self.record(&subject, run, DeploymentEvent::WorkloadObserved(observed))?;
        }
        let before = self.instances[turn].main.take();
        self.switch(turn, run, id, before.as_ref())?;
        let hostname = self.instances[turn].hostname.clone();
        let endpoint = deployment::EndpointObserved {
            url: format!("http://{hostname}/"),
            hostname,
            ready: true,
            http_status: Some(200),
            message: None,
        };
        self.record(&subject, run, DeploymentEvent::EndpointObserved(endpoint))?;
        let succeeded = deployment::Succeeded {
            revision: commit,
            table: self.table,
        };
        self.record(&subject, run, DeploymentEvent::Succeeded(succeeded))?;
        if let Some(before) = before {
            self.remove(&before, &service)?;
        }
        self.instances[turn].main = Some(Live { id, subject });
        Ok(())
    }

    fn build(
        &mut self,
        turn: usize,
        run: Uuid,
        deployment: &Subject,
        commit: SourceCommit,
    ) -> Result<(PinnedImage, BuildId), Failure> {
        let id = BuildId(Uuid::now_v7());
        let subject = Subject::Build(self.project.clone(), id);
        let resolved = deployment::SourceResolved {
            source: commit.clone(),
            build: id,
            branch: None,
        };
        self.record(deployment, run, DeploymentEvent::SourceResolved(resolved))?;
        let tag = ImageTag::parse(commit.commit.short())?;
        let Instance {
            instance,
            source,
            images,
            ..
        } = &self.instances[turn];
        let image = PinnedImage {
            repository: images.clone(),
            tag: tag.clone(),
            digest: Digest::of(commit.commit.as_str().as_bytes()),
        };
        let requested = build::Requested {
            project: self.project.clone(),
            service: instance.service.clone(),
            url: source.clone(),
            commit: commit.clone(),
            path: String::new(),
            spec: BuildSpec::default(),
            repository: images.clone(),
            tag,
        };
        self.record(&subject, run, BuildEvent::Requested(Box::new(requested)))?;
        let started = build::Started {
            attempt: 1,
            worker: "build-1".into(),
        };
        self.record(&subject, run, BuildEvent::Started(started))?;
        let builder = build::BuilderStarted {
            attempt: 1,
            commit: commit.commit,
        };
        self.record(&subject, run, BuildEvent::BuilderStarted(builder))?;
        let building = deployment::BuildingStarted { build: id };
        self.record(deployment, run, DeploymentEvent::BuildingStarted(building))?;
        let push = build::PushStarted {
            attempt: 1,
            digest: image.digest.clone(),
            builder: "archive".into(),
            detected: "python".into(),
            size_bytes: 4_321_000,
        };
        self.record(&subject, run, BuildEvent::PushStarted(push))?;
        let pushing = deployment::PushingStarted { build: id };
        self.record(deployment, run, DeploymentEvent::PushingStarted(pushing))?;
        let succeeded = build::Succeeded {
            attempt: 1,
            image: image.clone(),
            log: LogSeal {
                lines: 120,
                digest: Some(image.digest.clone()),
            },
        };
        self.record(&subject, run, BuildEvent::Succeeded(succeeded))?;
        Ok((image, id))
    }

    fn switch(
        &mut self,
        turn: usize,
        run: Uuid,
        to: DeploymentId,
        from: Option<&Live>,
    ) -> Result<(), Failure> {
        self.table += 1;
        let Instance {
            instance, hostname, ..
        } = &self.instances[turn];
        let backends = |deployment| {
            vec![Backend {
                deployment,
                weight: 100,
            }]
        };
        let (instance, hostname) = (instance.clone(), hostname.clone());
        let switched = routing::Switched {
            table: self.table,
            reason: SwitchReason::Deploy,
            instance,
            deployment: to,
            changes: vec![RouteChange {
                hostname: hostname.clone(),
                stickiness: Stickiness::Live,
                previous: from.map(|live| backends(live.id)).unwrap_or_default(),
                next: backends(to),
            }],
            main: Some(MainChange {
                previous: from.map(|live| live.id),
                next: Some(to),
            }),
            rolled_back: false,
            was_rolled_back: false,
            undoes: None,
            note: None,
            policy: None,
            domain: None,
        };
        let applied = routing::Applied {
            gateway: "west".into(),
            table: self.table,
            hostnames: vec![hostname],
            addresses: None,
            ingresses: None,
        };
        let routing = Subject::Routing(self.project.clone());
        self.record(&routing, run, RoutingEvent::Switched(Box::new(switched)))?;
        self.record(&routing, run, RoutingEvent::Applied(applied))
    }

    /// Stops a deployment that no traffic goes to any more, and removes it.
    fn remove(&mut self, live: &Live, service: &ServiceName) -> Result<(), Failure> {
        let (run, subject) = (live.id.0, &live.subject);
        let asked = || deployment::OperationRequested {
            reason: Some("a newer deployment has taken over".into()),
        };
        for replicas in [Some(0), None] {
            let (event, verb, change) = match replicas {
                Some(replicas) => (
                    DeploymentEvent::StopRequested(asked()),
                    "scale",
                    Change::Scale {
                        service: service.clone(),
                        deployment: live.id,
                        replicas,
                    },
                ),
                None => (
                    DeploymentEvent::TerminateRequested(asked()),
                    "remove",
                    Change::Remove {
                        service: service.clone(),
                        deployment: live.id,
                    },
                ),
            };
            self.record(subject, run, event)?;
            let commit = self.committed(run, verb, service, change)?;
            let committed = deployment::ChangeCommitted {
                commit: commit.clone(),
                replicas,
            };
            self.record(subject, run, DeploymentEvent::ChangeCommitted(committed))?;
            let observed = self.observed(&commit, None);
            self.record(subject, run, DeploymentEvent::WorkloadObserved(observed))?;
            let done = deployment::OperationDone { revision: commit };
            let event = match replicas {
                Some(_) => DeploymentEvent::Stopped(done),
                None => DeploymentEvent::Terminated(done),
            };
            self.record(subject, run, event)?;
        }
        self.revisions.remove(subject);
        Ok(())
    }

    fn committed(
        &mut self,
        run: Uuid,
        verb: &str,
        service: &ServiceName,
        change: Change,
    ) -> Result<CommitId, Failure> {
        let commit = self.commit_id()?;
        let parent = self.head.replace(commit.clone());
        let content = Digest::of(commit.as_str().as_bytes());
        let file = format!("environments/{}/values.yaml", self.environment);
        self.commits += 1;
        let committed = gitops::Committed {
            commit: commit.clone(),
            parent,
            environment: self.environment.clone(),
            change,
            message: format!("{verb}({}): {service} {}", self.environment, commit.short()),
            author: "A. Developer <a.developer@example.org>".into(),
            cause: EventId(Uuid::now_v7()),
            files: BTreeMap::from([(file, Some(content.clone()))]),
            files_digest: content,
            ordinal: Some(self.commits),
            ledger: Some(gitops::LedgerAnchor {
                size: self.commits * 1_000,
                root: BASE64.encode(Sha256::digest(commit.as_str())),
            }),
            signer: Some(SIGNER.to_owned()),
            unchanged: false,
        };
        let gitops = Subject::Gitops(self.project.clone());
        self.record(&gitops, run, GitopsEvent::Committed(Box::new(committed)))?;
        Ok(commit)
    }

    /// What the cluster shows: one instance that is ready or not yet, or none at all.
    fn observed(&self, commit: &CommitId, ready: Option<bool>) -> deployment::WorkloadObserved {
        let instances = ready.map(|ready| deployment::Instance {
            name: format!("release-{}-0", self.counter),
            address: "127.0.0.1:34567".into(),
            ready,
            restarts: 0,
        });
        deployment::WorkloadObserved {
            cluster: self.cluster.clone(),
            revision: commit.clone(),
            wanted: u32::from(ready.is_some()),
            instances: instances.into_iter().collect(),
            problem: None,
        }
    }

    fn commit_id(&self) -> Result<CommitId, InvalidName> {
        let random = Uuid::now_v7().simple().to_string();
        CommitId::parse(format!("{random}{}", &random[24..]))
    }

    /// Makes an event with the next revision of its aggregate.
    fn record<P: Payload>(
        &mut self,
        subject: &Subject,
        run: Uuid,
        payload: P,
    ) -> Result<(), Failure> {
        self.now += SignedDuration::from_millis(700);
        let revision = self.revisions.entry(subject.clone()).or_default();
        *revision += 1;
        let id = EventId(Uuid::now_v7());
        let event = NewEvent {
            subject: subject.clone(),
            revision: *revision,
            context: Context {
                id,
                time: self.now,
                correlation: run,
                causation: Some(EventId(Uuid::now_v7())),
                actor: Actor::system("worker/build"),
                traceparent: None,
                request_digest: None,
            },
            payload,
        };
        self.ready.push_back(Sample {
            subject: subject.clone(),
            id,
            bytes: event.to_bytes(self.now)?,
        });
        Ok(())
    }
}
