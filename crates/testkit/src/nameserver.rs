//! An authoritative nameserver that answers what it is told to, over UDP and TCP.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_server::Server;
use hickory_server::net::runtime::Time;
use hickory_server::proto::op::{Header, HeaderCounts, Metadata, ResponseCode};
use hickory_server::proto::rr::rdata::{A, AAAA, CNAME, SOA};
use hickory_server::proto::rr::{Name, RData, Record, RecordType};
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use tokio::runtime::Runtime;

/// What is answered for a name. Names of which nothing is said do not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// These addresses.
    Addresses(Vec<IpAddr>),
    /// It is another name for this one.
    Alias(String),
    /// It exists, and has no address.
    Nothing,
    /// The server has failed.
    Failure,
    /// Nothing ever comes.
    Silence,
}

type Names = Arc<Mutex<BTreeMap<String, Answer>>>;

/// A running nameserver. It ends when this is dropped.
#[derive(Debug)]
pub struct Nameserver {
    /// Where it answers.
    pub addr: SocketAddr,
    names: Names,
    runtime: Option<Runtime>,
}

impl Nameserver {
    /// Starts one on a free port, which knows no names.
    ///
    /// # Panics
    /// If there is no port that is free for UDP and for TCP.
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let names = Names::default();
        let (udp, tcp) = (0..50)
            .find_map(|_| {
                let udp = std::net::UdpSocket::bind("127.0.0.1:0").ok()?;
                let tcp = std::net::TcpListener::bind(udp.local_addr().ok()?).ok()?;
                Some((udp, tcp))
            })
            .expect("a port");
        let addr = udp.local_addr().expect("an address");
        udp.set_nonblocking(true).expect("a socket");
        tcp.set_nonblocking(true).expect("a socket");
        {
            let _within = runtime.enter();
            let mut server = Server::new(Zone(names.clone()));
            server.register_socket(tokio::net::UdpSocket::from_std(udp).expect("a socket"));
            let tcp = tokio::net::TcpListener::from_std(tcp).expect("a socket");
            server.register_listener(tcp, Duration::from_secs(5), 64);
            runtime.spawn(async move { server.block_until_done().await });
        }
        Self {
            addr,
            names,
            runtime: Some(runtime),
        }
    }

    /// From now on this is answered for a name.
    pub fn set(&self, name: &str, answer: Answer) {
        self.names().insert(name.to_owned(), answer);
    }

    /// From now on the name is that of this address.
    pub fn point(&self, name: &str, to: &str) {
        let to = to.parse().expect("an address");
        self.set(name, Answer::Addresses(vec![to]));
    }

    /// From now on there is no such name.
    pub fn forget(&self, name: &str) {
        self.names().remove(name);
    }

    fn names(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Answer>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Nameserver {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Zone(Names);

impl Zone {
    fn get(&self, name: &str) -> Option<Answer> {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        names.get(name).cloned()
    }

    /// The records of a name, with those of what it is an alias of.
    fn records(&self, name: &Name, kind: RecordType) -> Result<Vec<Record>, ResponseCode> {
        let mut records = Vec::new();
        let mut name = name.clone();
        for _ in 0..8 {
            let text = name.to_ascii().to_ascii_lowercase();
            match self.get(text.trim_end_matches('.')) {
                None => return Err(ResponseCode::NXDomain),
                Some(Answer::Failure | Answer::Silence) => return Err(ResponseCode::ServFail),
                Some(Answer::Nothing) => return Ok(records),
                Some(Answer::Addresses(addresses)) => {
                    let addresses = addresses.into_iter().filter_map(|address| match address {
                        IpAddr::V4(v4) if kind == RecordType::A => Some(RData::A(A(v4))),
                        IpAddr::V6(v6) if kind == RecordType::AAAA => Some(RData::AAAA(AAAA(v6))),
                        _ => None,
                    });
                    records.extend(addresses.map(|a| Record::from_rdata(name.clone(), 60, a)));
                    return Ok(records);
                }
                Some(Answer::Alias(other)) => {
                    let mut other = Name::from_ascii(&other).expect("a name");
                    other.set_fqdn(true);
                    let alias = RData::CNAME(CNAME(other.clone()));
                    records.push(Record::from_rdata(name, 60, alias));
                    name = other;
                }
            }
        }
        Err(ResponseCode::ServFail)
    }
}

#[async_trait::async_trait]
impl RequestHandler for Zone {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response: R,
    ) -> ResponseInfo {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.authoritative = true;
        let unanswered = move || {
            ResponseInfo::from(Header {
                metadata,
                counts: HeaderCounts::default(),
            })
        };
        let Ok(asked) = request.request_info() else {
            return unanswered();
        };
        let name: Name = asked.query.name().into();
        let text = name.to_ascii().to_ascii_lowercase();
        if self.get(text.trim_end_matches('.')) == Some(Answer::Silence) {
            return unanswered();
        }
        let records = self.records(&name, asked.query.query_type());
        if let Err(code) = records {
            metadata.response_code = code;
        }
        let records = records.unwrap_or_default();
        let zone = name.base_name();
        let soa = SOA::new(zone.clone(), zone.clone(), 1, 60, 60, 60, 60);
        let soa = Record::from_rdata(zone, 60, RData::SOA(soa));
        let soa = if records.is_empty() {
            vec![soa]
        } else {
            Vec::new()
        };
        let builder = MessageResponseBuilder::from_message_request(request);
        let answer = builder.build(metadata, &records, &[], &soa, &[]);
        match response.send_response(answer).await {
            Ok(info) => info,
            Err(_) => unanswered(),
        }
    }
}
