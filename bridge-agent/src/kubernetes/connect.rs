//! How the API server is reached.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper::header::{AUTHORIZATION, HeaderValue};
use hyper::{Request, Uri};
use ipnet::IpNet;
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use thiserror::Error;
use tower::util::MapRequestLayer;

use super::plugin::{MAX_OUTPUT, TOO_MUCH, limit_plugins};
use super::thread::PLUGIN_DEADLINE;
use crate::config::{Kubernetes, check_node_name, leaf::Problem, node_variable, ports::one_port};
use crate::kernel::{
    files::{self, MAX_SMALL, is_refusal, read_regular_text},
    lock::lock,
};

/// The files of a pod's service account.
pub(super) const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Why nothing can be asked of a cluster.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no service account.
    #[error(
        "no service account of a pod is here ({0}); name a kubeconfig: `kubernetes: {{kubeconfig: PATH}}`, or run the agent \
         as a pod that has one"
    )]
    NotInCluster(String),
    /// The kubeconfig.
    #[error("{}: {reason}; check it with `kubectl --kubeconfig {} version`", path.display(), path.display())]
    Kubeconfig {
        path: PathBuf,
        /// The fault.
        reason: String,
    },
    /// The client cannot be made, for instance of the certificates that are there.
    #[error(
        "no connection to the API server can be made: {0}; check certificates and token of the kubeconfig"
    )]
    Client(String),
    /// The thread of the cluster cannot be started.
    #[error("cannot start the thread that follows the cluster: {0}")]
    Thread(std::io::Error),
    /// The host name cannot be read.
    #[error("the host name cannot be read: {0}; write `kubernetes: {{nodeName: NAME}}`")]
    HostName(std::io::Error),
    /// The name of this node is not one of a node.
    #[error("by {origin}, {problem}; or write `kubernetes: {{nodeName: NAME}}`")]
    NodeName { origin: &'static str, problem: Problem },
}

/// Looks whether there is something to connect with; nothing is asked of the network.
pub(super) fn check(section: &Kubernetes) -> Result<(), Error> {
    match &section.kubeconfig {
        None => in_cluster(Path::new(SERVICE_ACCOUNT)).map(drop),
        Some(path) => {
            let wrong = |reason: String| Error::Kubeconfig { path: path.0.clone(), reason };
            let file = read_kubeconfig(&path.0).map_err(wrong)?;
            let wanted = section.context.as_ref().or(file.current_context.as_ref());
            let wanted =
                wanted.ok_or_else(|| wrong("it has no current context, and `context` names none".into()))?;
            if file.contexts.iter().any(|context| context.name == *wanted) {
                return check_entries(&file, wanted).map_err(wrong);
            }
            let names: Vec<&str> = file.contexts.iter().map(|context| context.name.as_str()).collect();
            Err(wrong(format!("it has no context `{wanted}`, but {}", names.join(", "))))
        }
    }
}

/// Returns a client, and its server's address. Reads all files again: certificates may have been renewed.
pub(super) async fn connect(section: &Kubernetes) -> Result<(Client, String), Error> {
    let config = match &section.kubeconfig {
        None => in_cluster(Path::new(SERVICE_ACCOUNT))?,
        Some(path) => {
            let wrong = |reason: String| Error::Kubeconfig { path: path.0.clone(), reason };
            let mut file = read_kubeconfig(&path.0).map_err(wrong)?;
            limit_plugins(&mut file);
            if let Some(context) = section.context.as_ref().or(file.current_context.as_ref()) {
                check_entries(&file, context).map_err(wrong)?;
            }
            let options = KubeConfigOptions { context: section.context.clone(), ..Default::default() };
            let mut config =
                Config::from_custom_kubeconfig(file, &options).await.map_err(|error| wrong(cause(&error)))?;
            if config.proxy_url.is_some() && bypasses_proxy(&config.cluster_url, &no_proxy()) {
                config.proxy_url = None;
            }
            if let Some(proxy) = &config.proxy_url {
                return Err(wrong(format!(
                    "the API server would be reached through the proxy {}, which is not supported; add {} to NO_PROXY, \
                     or remove HTTPS_PROXY or `proxy-url`",
                    without_password(&proxy.to_string()),
                    config.cluster_url.host().unwrap_or_default()
                )));
            }
            config
        }
    };
    let server = config.cluster_url.to_string();
    let client = client(config).map_err(|error| {
        let text = cause(&error);
        // The agent has killed it: no plugin kills itself.
        let killed = text.contains("SIGKILL");
        let wrote_too_much = text.contains(&format!("exit status: {TOO_MUCH}"));
        Error::Client(if killed {
            format!("{text}; the credential plugin did not answer within {PLUGIN_DEADLINE:?}")
        } else if wrote_too_much {
            format!("the credential plugin wrote more than {MAX_OUTPUT} bytes, and was killed")
        } else {
            text
        })
    })?;
    Ok((client, server))
}

/// Builds a client. The token of a file is trimmed, as client-go does: most end with a newline, which no header may hold.
fn client(mut config: Config) -> Result<Client, kube::Error> {
    let file = match &config.auth_info {
        info if info.token.is_some() || info.username.is_some() => None,
        _ => config.auth_info.token_file.take(),
    };
    let Some(file) = file else { return Client::try_from(config) };
    let token = Arc::new(TokenFile::read(file.into())?);
    let layer = MapRequestLayer::new(move |mut request: Request<Body>| {
        if let Some(value) = token.header() {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        request
    });
    Ok(ClientBuilder::try_from(config)?.with_layer(&layer).build())
}

/// A file with a bearer token, which its owner may replace.
struct TokenFile {
    path: PathBuf,
    last: Mutex<(Instant, HeaderValue)>,
}

impl TokenFile {
    /// As client-go: a token is renewed a minute before it expires, and is read that often.
    const FRESH: Duration = Duration::from_secs(10);

    fn read(path: PathBuf) -> Result<Self, kube::Error> {
        let header = Self::load(&path).map_err(|error| {
            kube::Error::Service(format!("cannot use the token file {}: {error}", path.display()).into())
        })?;
        Ok(Self { path, last: Mutex::new((Instant::now(), header)) })
    }

    fn load(path: &Path) -> io::Result<HeaderValue> {
        let token = read_regular_text(path, MAX_SMALL)?;
        let token = token.trim();
        if token.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty"));
        }
        let mut header = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it has characters that no token has"))?;
        header.set_sensitive(true);
        Ok(header)
    }

    /// Returns the header. While the file cannot be read, the last token is used.
    fn header(&self) -> Option<HeaderValue> {
        let mut last = lock(&self.last);
        if last.0.elapsed() >= Self::FRESH {
            match Self::load(&self.path) {
                Ok(header) => last.1 = header,
                Err(error) => {
                    tracing::warn!(%error, path = %self.path.display(), "the token file cannot be read; the last token is used");
                }
            }
            last.0 = Instant::now();
        }
        Some(last.1.clone())
    }
}

/// Reads a kubeconfig. The client reads the files that it names later: they are checked here.
pub(super) fn read_kubeconfig(path: &Path) -> Result<Kubeconfig, String> {
    files::check(path, MAX_SMALL).map_err(|error| error.to_string())?;
    let file = Kubeconfig::read_from(path).map_err(|error| cause(&error))?;
    let authorities =
        file.clusters.iter().filter_map(|entry| entry.cluster.as_ref()?.certificate_authority.as_ref());
    let users = file.auth_infos.iter().filter_map(|entry| entry.auth_info.as_ref());
    let of_users = users.flat_map(|user| {
        [&user.client_certificate, &user.client_key, &user.token_file].into_iter().flatten()
    });
    for named in authorities.chain(of_users) {
        // A file that is missing may belong to a context that is not used.
        if let Err(error) = files::check(Path::new(named), MAX_SMALL)
            && is_refusal(&error)
        {
            return Err(format!("it names {named}, and {error}"));
        }
    }
    Ok(file)
}

/// Refuses entries of a kubeconfig that would be misunderstood.
fn check_entries(file: &Kubeconfig, context: &str) -> Result<(), String> {
    let context =
        file.contexts.iter().find(|entry| entry.name == context).and_then(|entry| entry.context.as_ref());
    let Some(context) = context else { return Ok(()) };
    let cluster = file.clusters.iter().find(|entry| entry.name == context.cluster);
    if let Some(server) = cluster.and_then(|entry| entry.cluster.as_ref()?.server.as_ref())
        && let Err(fault) = check_server(server)
    {
        let shown = without_password(server);
        return Err(format!(
            "`server: {shown}` of the cluster `{}` {fault}; write https://HOST:PORT",
            context.cluster
        ));
    }
    let user =
        context.user.as_ref().and_then(|name| file.auth_infos.iter().find(|entry| entry.name == *name));
    if let Some(provider) = user.and_then(|entry| entry.auth_info.as_ref()?.auth_provider.as_ref()) {
        return Err(format!(
            "the user `{}` has the auth-provider `{}`, which Kubernetes removed in 1.26 and bridge does not support; \
             use an exec plugin, a client certificate or a token file",
            context.user.as_deref().unwrap_or_default(),
            provider.name
        ));
    }
    Ok(())
}

/// Checks the URL of an API server. Returns its fault.
fn check_server(server: &str) -> Result<(), &'static str> {
    let uri = server.parse::<Uri>().map_err(|_| "is not a URL")?;
    let authority = uri.authority().filter(|_| matches!(uri.scheme_str(), Some("https" | "http")));
    let authority = authority.filter(|authority| !authority.host().is_empty()).ok_or("is not a URL")?;
    if authority.as_str().contains('@') {
        return Err("has a user or a password, which belong to `users`");
    }
    if uri.query().is_some() || server.contains('#') {
        return Err("has a query or a fragment");
    }
    match authority.as_str().strip_prefix(authority.host()) {
        Some("") => Ok(()),
        Some(port) => match port.strip_prefix(':').map(one_port) {
            Some(Ok(_)) => Ok(()),
            _ => Err("has no port from 1 to 65535"),
        },
        None => Err("is not a URL"),
    }
}

/// A URL without user and password, for messages.
fn without_password(url: &str) -> String {
    let Some((before, host)) = url.rsplit_once('@') else { return url.to_owned() };
    let scheme = before.split_once("://").map(|(scheme, _)| format!("{scheme}://")).unwrap_or_default();
    format!("{scheme}***@{host}")
}

/// Returns the configuration of a pod's service account. The client reads its files without a limit: they are checked here.
fn in_cluster(directory: &Path) -> Result<Config, Error> {
    for name in ["token", "ca.crt", "namespace"] {
        let path = directory.join(name);
        if let Err(error) = files::check(&path, MAX_SMALL) {
            return Err(Error::NotInCluster(format!("{}: {error}", path.display())));
        }
    }
    Config::incluster().map_err(|error| Error::NotInCluster(error.to_string()))
}

/// `NO_PROXY`.
fn no_proxy() -> String {
    ["NO_PROXY", "no_proxy"].iter().find_map(|name| std::env::var(name).ok()).unwrap_or_default()
}

/// Whether a list such as `NO_PROXY` covers a server, by the rules of client-go (golang.org/x/net/http/httpproxy): names
/// cover their subdomains, and only those if they begin with a dot; addresses and networks; each with a port or without.
fn bypasses_proxy(server: &Uri, list: &str) -> bool {
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']).to_ascii_lowercase();
    let port = server.port_u16().unwrap_or(if server.scheme_str() == Some("http") { 80 } else { 443 });
    let address: Option<IpAddr> = host.parse().ok();
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    list.split(',').map(|entry| entry.trim().to_ascii_lowercase()).filter(|entry| !entry.is_empty()).any(
        |entry| {
            if entry == "*" {
                return true;
            }
            if let Ok(network) = entry.parse::<IpNet>() {
                return address.is_some_and(|address| network.contains(&address));
            }
            let (name, only) = match entry.rsplit_once(':') {
                Some((name, number)) if !name.contains(':') || name.ends_with(']') => {
                    match number.parse::<u16>() {
                        Ok(number) => (name, Some(number)),
                        Err(_) => return false,
                    }
                }
                _ => (entry.as_str(), None),
            };
            if only.is_some_and(|only| only != port) {
                return false;
            }
            let name = name.trim_matches(['[', ']']);
            if let Ok(one) = name.parse::<IpAddr>() {
                return address == Some(one);
            }
            let name = name.strip_prefix('*').unwrap_or(name);
            match name.strip_prefix('.') {
                Some(_) => host.ends_with(name),
                None => host == name || host.ends_with(&format!(".{name}")),
            }
        },
    )
}

/// The name of this node in the cluster.
pub(super) fn node_name(section: &Kubernetes) -> Result<String, Error> {
    match &section.node_name {
        Some(name) => Ok(name.clone()),
        None => named_by(node_variable(), || std::fs::read_to_string("/proc/sys/kernel/hostname")),
    }
}

/// The name of this node by a variable, else by the host name.
fn named_by(
    variable: Option<String>,
    host_name: impl FnOnce() -> io::Result<String>,
) -> Result<String, Error> {
    let (origin, name) = match variable {
        Some(name) => ("the variable NODE_NAME", name),
        // As kubelet does.
        None => ("the host name", host_name().map_err(Error::HostName)?.trim().to_lowercase()),
    };
    match check_node_name(&name) {
        Ok(()) => Ok(name),
        Err(problem) => Err(Error::NodeName { origin, problem }),
    }
}

/// An error with all that it comes from, each said once.
pub(super) fn cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::leaf::AbsolutePath;

    #[test]
    fn a_kubeconfig_that_cannot_be_used_says_what_to_check() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let section = |context: Option<&str>| Kubernetes {
            kubeconfig: Some(AbsolutePath(path.clone())),
            context: context.map(str::to_owned),
            ..Kubernetes::default()
        };
        let reason = |context| check(&section(context)).unwrap_err().to_string();
        assert!(reason(None).contains("kubectl --kubeconfig"), "{}", reason(None));
        std::fs::write(
            &path,
            "apiVersion: v1\nkind: Config\ncontexts: [{name: lab, context: {cluster: x, user: y}}]\n",
        )
        .unwrap();
        assert!(reason(None).contains("it has no current context"), "{}", reason(None));
        assert!(reason(Some("prod")).contains("no context `prod`, but lab"), "{}", reason(Some("prod")));
        check(&section(Some("lab"))).unwrap();
    }

    #[test]
    fn a_fifo_or_a_device_is_neither_kubeconfig_nor_certificate_nor_token() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let fifo = folder.path().join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let error = read_kubeconfig(&fifo).unwrap_err();
        assert!(error.contains("it is a FIFO"), "{error}");
        assert!(read_kubeconfig(Path::new("/dev/zero")).unwrap_err().contains("it is a device"));
        assert!(TokenFile::load(&fifo).unwrap_err().to_string().contains("it is a FIFO"));
        for (cluster, user) in [
            ("certificate-authority: fifo", "token: x"),
            ("server: 'https://a'", "client-certificate: fifo"),
            ("server: 'https://a'", "client-key: fifo"),
            ("server: 'https://a'", "tokenFile: fifo"),
        ] {
            let text = format!(
                "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{{cluster}}}}}]\n\
                 users: [{{name: u, user: {{{user}}}}}]\n"
            );
            std::fs::write(&path, text.replace("fifo", &fifo.display().to_string())).unwrap();
            let error = read_kubeconfig(&path).unwrap_err();
            assert!(error.contains("fifo") && error.contains("it is a FIFO"), "{error}");
        }
    }

    #[test]
    fn the_files_of_a_service_account_are_checked_before_they_are_read() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let error = || in_cluster(folder.path()).unwrap_err().to_string();
        assert!(error().contains("token: No such file"), "{}", error());
        for name in ["token", "ca.crt", "namespace"] {
            mknodat(CWD, path(name), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            assert!(error().contains(&format!("{name}: it is a FIFO")), "{}", error());
            std::fs::remove_file(path(name)).unwrap();
            std::fs::create_dir(path(name)).unwrap();
            assert!(error().contains(&format!("{name}: it is a directory")), "{}", error());
            std::fs::remove_dir(path(name)).unwrap();
            let file = std::fs::File::create(path(name)).unwrap();
            file.set_len(MAX_SMALL + 1).unwrap();
            assert!(error().contains(&format!("{name}: it is larger than")), "{}", error());
            file.set_len(1).unwrap();
        }
        // The files are right; the variables of a pod are missing.
        assert!(error().contains("no service account") && !error().contains("it is"), "{}", error());
    }

    #[test]
    fn odd_names_of_a_node_are_refused_with_a_remedy() {
        let by = |variable: Option<&str>, host: &str| {
            named_by(variable.map(str::to_owned), || Ok(host.to_owned())).map_err(|error| error.to_string())
        };
        for (variable, host, name) in [
            (Some("node-1"), "other", "node-1"),
            (Some("0"), "", "0"),
            (Some("a.b-c.example"), "", "a.b-c.example"),
            (None, "node-1\n", "node-1"),
            // As kubelet does.
            (None, " Node-1.Example \n", "node-1.example"),
        ] {
            assert_eq!(by(variable, host).unwrap(), name);
        }
        let (long, longer) = ("a".repeat(254), "x\u{e4}".repeat(60_000));
        for odd in [
            " ",
            "Node-1",
            "node_1",
            "node-1 ",
            "node 1",
            "node-1\n",
            "-",
            "-a",
            "a-",
            ".",
            "a..b",
            "a.",
            ".a",
            "a/b",
            "../a",
            "a,b=c",
            "n\u{f6}de",
            "a\u{202e}b",
            "\u{663}",
            "\u{fffd}",
            "$(NODE)",
            "%s",
            "--help",
            "*",
            "a\u{1b}[31m",
            &long,
            &longer,
        ] {
            let error = by(Some(odd), "node-1").expect_err(odd);
            assert!(
                error.contains("by the variable NODE_NAME") && error.contains("write the name that"),
                "{odd:?}: {error}"
            );
            assert!(
                error.contains("`kubernetes: {nodeName: NAME}`") && error.len() < 1000,
                "{odd:?}: {error}"
            );
            assert!(!error.chars().any(char::is_control), "{odd:?}: {error:?}");
        }
        for odd in ["", "\n", "(none)", "node_1", "a b", "localhost:80"] {
            let error = by(None, odd).expect_err(odd);
            assert!(
                error.contains("by the host name") && error.contains("nodeName: NAME"),
                "{odd:?}: {error}"
            );
        }
        let unread = named_by(None, || Err(io::ErrorKind::InvalidData.into())).unwrap_err().to_string();
        assert!(unread.contains("host name cannot be read") && unread.contains("nodeName: NAME"), "{unread}");
    }

    #[test]
    fn entries_that_would_be_misunderstood_are_refused() {
        let check = |server: &str, user: &str| {
            let text = format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
                 contexts: [{{name: lab, context: {{cluster: c, user: u}}}}]\n\
                 clusters: [{{name: c, cluster: {{server: \"{server}\"}}}}]\n\
                 users: [{{name: u, user: {user}}}]\n"
            );
            check_entries(&Kubeconfig::from_yaml(&text).unwrap(), "lab")
        };
        check("https://192.168.31.5:6443", "{token: x}").unwrap();
        check("https://[fd31::5]:6443", "{token: x}").unwrap();
        check("https://api.example/k8s/clusters/c-1", "{token: x}").unwrap();
        for server in [
            "192.168.31.5:6443",
            "192.168.31.5",
            "api.example",
            "",
            "ftp://api",
            "https://",
            "https://api:99999",
            "https://api:0",
            "https://api:",
            "https://api:06443",
            "https://[fd31::5]:65536",
            "https://api:6443?x=1",
            "https://api:6443#x",
            "https://admin:hunter2@api:6443",
            "admin:hunter2@api",
            "https://ad min:hunter2@api",
        ] {
            let error = check(server, "{token: x}").unwrap_err();
            assert!(error.contains("write https://HOST:PORT"), "{server}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = check("https://api", "{auth-provider: {name: gcp, config: {}}}").unwrap_err();
        assert!(error.contains("auth-provider `gcp`") && error.contains("exec plugin"), "{error}");
    }

    #[test]
    fn no_proxy_covers_names_addresses_and_networks() {
        let covers = |server: &str, list: &str| bypasses_proxy(&server.parse().unwrap(), list);
        for (server, list) in [
            ("https://192.168.31.5:6443", "localhost, 192.168.31.0/24"),
            ("https://192.168.31.5:6443", "192.168.31.5"),
            ("https://192.168.31.5:6443", "192.168.31.5:6443"),
            ("https://[fd31::5]:6443", "fd31::/64"),
            ("https://[fd31::5]:6443", "[fd31::5]:6443"),
            ("https://api.example.com", "Example.com"),
            ("https://api.example.com", ".example.com"),
            ("https://api.example.com", "*.example.com"),
            ("https://api.example.com", "a,*"),
            ("https://127.0.0.1:6443", ""),
        ] {
            assert!(covers(server, list), "{server} is in {list}");
        }
        for (server, list) in [
            ("https://192.168.31.5:6443", ""),
            ("https://192.168.31.5:6443", "192.168.32.0/24"),
            ("https://192.168.31.5:6443", "192.168.31.5:443"),
            ("https://192.168.31.50:6443", "192.168.31.5"),
            ("https://example.com", ".example.com"),
            ("https://badexample.com", "example.com"),
        ] {
            assert!(!covers(server, list), "{server} is not in {list}");
        }
    }

    #[test]
    fn a_token_file_is_trimmed_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "first\n").unwrap();
        let token = TokenFile::read(path.clone()).unwrap();
        let header = || token.header().unwrap().to_str().unwrap().to_owned();
        assert_eq!(header(), "Bearer first");
        let age = || lock(&token.last).0 = Instant::now().checked_sub(TokenFile::FRESH).unwrap();
        std::fs::write(&path, " second\r\n\n").unwrap();
        age();
        assert_eq!(header(), "Bearer second");
        std::fs::write(&path, "\n").unwrap();
        age();
        assert_eq!(header(), "Bearer second", "an empty file is no token");
        assert!(TokenFile::read(path).is_err());
    }
}
