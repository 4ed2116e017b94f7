//! A real kube-apiserver and its etcd, on the LAN of a lab: 192.168.31.2, port 6443.
//!
//! They run in the namespace of the LAN's bridge, so that LAN hosts and nodes reach them as they would a control plane, and
//! so that labs beside each other do not meet. Everyone has a token, and RBAC decides; all of it goes with the lab.

mod assets;
mod credentials;
pub mod objects;
mod plugins;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

pub use self::assets::Assets;
pub use self::credentials::User;
use crate::lab::{Host, Lab, Netns, Process};
use crate::wait::eventually;

/// Where the API server listens.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 31, 2);
const PORT: u16 = 6443;
/// How long etcd and the API server may take to come up on a busy machine.
const STARTING: Duration = Duration::from_secs(120);

/// An API server; it ends when this is dropped.
#[derive(Debug)]
pub struct ApiServer {
    assets: Assets,
    netns: Netns,
    directory: PathBuf,
    server: Option<Process>,
    _etcd: Process,
}

impl ApiServer {
    /// Starts etcd and the API server on the LAN of `lab`, and installs the definitions and roles of bridge.
    ///
    /// # Errors
    /// They are not to be found, or do not come up; with what they wrote.
    pub fn start(lab: &Lab) -> Result<Self> {
        let assets = Assets::find()?;
        let netns = lab.lan().clone();
        netns.ip("link set lo up")?;
        netns.ip(&format!("address add {ADDRESS}/24 dev lan0"))?;
        let directory = lab.directory().join("kubernetes");
        fs::create_dir_all(&directory)?;
        credentials::write(&directory)?;
        fs::write(directory.join("audit.yaml"), credentials::audit_policy())?;
        let mut etcd = Command::new(&assets.etcd);
        etcd.arg("--data-dir").arg(directory.join("etcd")).args(["--log-level", "error"]);
        let etcd = start(&netns, etcd, &directory.join("etcd.log"))?;
        let mut this = Self { assets, netns, directory, server: None, _etcd: etcd };
        this.start_server()?;
        this.install()?;
        Ok(this)
    }

    /// Starts the API server, after [`Self::stop_server`].
    pub fn start_server(&mut self) -> Result<()> {
        let at = |name: &str| self.directory.join(name).display().to_string();
        let mut server = Command::new(&self.assets.server);
        for (flag, value) in [
            ("etcd-servers", "http://127.0.0.1:2379".to_owned()),
            ("advertise-address", ADDRESS.to_string()),
            ("bind-address", "0.0.0.0".to_owned()),
            ("secure-port", PORT.to_string()),
            ("tls-cert-file", at("server.crt")),
            ("tls-private-key-file", at("server.key")),
            ("token-auth-file", at("tokens.csv")),
            ("authorization-mode", "RBAC".to_owned()),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-account-signing-key-file", at("server.key")),
            ("service-account-key-file", at("server.crt")),
            ("service-cluster-ip-range", "10.96.0.0/16".to_owned()),
            // There is no controller manager here to make service accounts for namespaces.
            ("disable-admission-plugins", "ServiceAccount".to_owned()),
            ("cert-dir", at("")),
            ("audit-policy-file", at("audit.yaml")),
            ("audit-log-path", at("audit.log")),
        ] {
            server.arg(format!("--{flag}={value}"));
        }
        let log = self.directory.join("server.log");
        let mut process = start(&self.netns, server, &log)?;
        let mut ended = None;
        eventually(STARTING, || {
            ended = process.wait(Duration::ZERO).ok().flatten();
            if ended.is_some() {
                return Some(());
            }
            self.request(User::Admin, "GET", "/readyz", None).ok().map(drop)
        });
        if ended.is_some() || self.request(User::Admin, "GET", "/readyz", None).is_err() {
            bail!("kube-apiserver did not come up:\n{}", fs::read_to_string(&log).unwrap_or_default());
        }
        self.server = Some(process);
        Ok(())
    }

    /// Starts kube-proxy for a node of the lab, in one of its modes; it writes its log beside those of the server.
    ///
    /// # Errors
    /// It is not to be found (`cargo xtask cluster --build`), or does not start.
    pub fn start_proxy(&self, host: &Host, mode: &str) -> Result<Process> {
        let mut proxy = Command::new(assets::find("kube-proxy")?);
        proxy.arg("--kubeconfig").arg(self.kubeconfig(User::Admin));
        proxy.args([
            "--hostname-override",
            &host.name,
            "--proxy-mode",
            mode,
            "--cluster-cidr",
            "10.200.0.0/16",
        ]);
        proxy.args(["--conntrack-max-per-core", "0", "--healthz-bind-address", "127.0.0.1:10256"]);
        start(&host.netns, proxy, &self.directory.join(format!("proxy-{}.log", host.name)))
    }

    /// Kills the API server; etcd keeps what it has.
    pub fn stop_server(&mut self) {
        self.server = None;
    }

    /// Makes etcd forget everything but the present: a watch from an earlier time then fails.
    pub fn compact(&self) -> Result<()> {
        let revision = self.etcd("range", r#"{"key": "AA=="}"#)?["header"]["revision"].clone();
        let revision = revision.as_str().context("etcd reports its revision")?;
        self.etcd("compaction", &format!(r#"{{"revision": "{revision}", "physical": true}}"#)).map(drop)
    }

    fn etcd(&self, call: &str, body: &str) -> Result<Value> {
        // etcd's own gateway from JSON to gRPC; 3.4 has it in v3.
        let path = if call == "compaction" { "kv/compaction" } else { "kv/range" };
        let mut curl = Command::new("curl");
        curl.args(["-sSf", "--max-time", "10", "-d", body, &format!("http://127.0.0.1:2379/v3/{path}")]);
        let text = self.netns.output(curl)?;
        serde_json::from_str(&text).with_context(|| text)
    }

    /// A kubeconfig for `user`, whose token is in a file beside it.
    pub fn kubeconfig(&self, user: User) -> PathBuf {
        credentials::kubeconfig(&self.directory, user)
    }

    /// Gives `user` another token, and has the API server take it from now on, instead of the old one. Ends the API server.
    pub fn rotate(&mut self, user: User) -> Result<()> {
        self.stop_server();
        credentials::rotate(&self.directory, user)
    }

    /// Runs `kubectl` as an administrator.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new(&self.assets.kubectl);
        command.args(arguments).arg("--kubeconfig").arg(self.kubeconfig(User::Admin));
        command.env("HOME", &self.directory);
        run(&self.netns, command, input)
    }

    /// `kubectl apply` of a YAML text.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl(&["apply", "-f", "-"], yaml)
    }

    /// Makes a request with a JSON body; the path begins with `/api` or `/apis`.
    pub fn request(&self, user: User, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail-with-body", "--max-time", "30", "-X", method, "--cacert"]);
        curl.arg(self.directory.join("ca.crt"));
        curl.arg("-H").arg(format!("Authorization: Bearer {}", credentials::token(&self.directory, user)?));
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        curl.arg("-H").arg(format!("Content-Type: {kind}"));
        if body.is_some() {
            curl.args(["--data-binary", "@-"]);
        }
        curl.arg(format!("https://{ADDRESS}:{PORT}{path}"));
        let input = body.map(Value::to_string).unwrap_or_default();
        let text = run(&self.netns, curl, &input)?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Runs a script that calls `kubectl`, as an administrator, and returns what it prints.
    pub fn run_script(&self, path: &str) -> Result<String> {
        let mut command = Command::new(path);
        let programs = self.assets.kubectl.parent().context("kubectl lies somewhere")?.display();
        command.env("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap_or_default()));
        command.env("KUBECONFIG", self.kubeconfig(User::Admin)).env("HOME", &self.directory);
        run(&self.netns, command, "")
    }

    /// A token of a service account of bridge, as a pod would get it.
    fn account_token(&self, namespace: &str, account: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
        let answer = self.request(User::Admin, "POST", &path, Some(&request))?;
        Ok(answer["status"]["token"].as_str().context("a token")?.to_owned())
    }

    /// Gives `user` the token of its service account in the place of its own.
    pub fn take_account_token(&self, user: User) -> Result<()> {
        credentials::replace(&self.directory, user, &self.account_token("bridge-system", user.name())?)
    }

    /// Gives `user` the token that kubelet would mount into a pod of its service account; the pod exists.
    pub fn take_pod_token(&self, user: User, pod: &str) -> Result<()> {
        let path = format!("/api/v1/namespaces/bridge-system/serviceaccounts/{}/token", user.name());
        let bound = json!({"kind": "Pod", "apiVersion": "v1", "name": pod});
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": bound}});
        let answer = self.request(User::Admin, "POST", &path, Some(&request))?;
        credentials::replace(&self.directory, user, answer["status"]["token"].as_str().context("a token")?)
    }

    /// Fills the Secret of this name with a token of the account of this name, as kube-controller-manager does.
    pub fn fill_token_secret(&self, namespace: &str, account: &str) -> Result<()> {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token",
            "metadata": {"name": account, "annotations": {"kubernetes.io/service-account.name": account}},
            "stringData": {
                "token": self.account_token(namespace, account)?,
                "ca.crt": fs::read_to_string(self.directory.join("ca.crt"))?,
            },
        });
        let path = format!("/api/v1/namespaces/{namespace}/secrets");
        self.request(User::Admin, "POST", &path, Some(&secret)).map(drop)
    }

    /// What `user` has asked of resources so far, allowed or not: verb and resource, as `list nodes.` or
    /// `patch bridgenodes/status.bridge.lan`.
    ///
    /// # Errors
    /// The audit log of the server cannot be read.
    pub fn requests_of(&self, user: User) -> Result<BTreeSet<String>> {
        Ok(self.requests(user)?.into_iter().collect())
    }

    /// Counts the requests of `user` with this verb and resource.
    ///
    /// # Errors
    /// The audit log of the server cannot be read.
    pub fn count_requests(&self, user: User, request: &str) -> Result<usize> {
        Ok(self.requests(user)?.iter().filter(|one| *one == request).count())
    }

    fn requests(&self, user: User) -> Result<Vec<String>> {
        let log = fs::read_to_string(self.directory.join("audit.log")).context("read the audit log")?;
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of_user = events.filter(|event| {
            event["user"]["username"] == user.account() && event["stage"] != "RequestReceived"
        });
        let what = |event: Value| {
            let object = &event["objectRef"];
            let part = object["subresource"].as_str().map(|part| format!("/{part}")).unwrap_or_default();
            let group = object["apiGroup"].as_str().unwrap_or_default();
            Some(format!("{} {}{part}.{group}", event["verb"].as_str()?, object["resource"].as_str()?))
        };
        Ok(of_user.filter_map(what).collect())
    }

    /// The definitions and the roles of `deploy/kubernetes`.
    fn install(&self) -> Result<()> {
        self.kubectl(&["apply", "-f", &deployed("crds")], "")?;
        self.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"], "")?;
        for file in ["namespace.yaml", "rbac.yaml", "lan-host.yaml", "admission.yaml"] {
            self.kubectl(&["apply", "-f", &deployed(file)], "")?;
        }
        Ok(())
    }
}

/// A file or folder of `deploy/kubernetes`.
#[must_use]
pub fn deployed(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes").join(name).display().to_string()
}

/// Starts a process whose output goes to a file.
fn start(netns: &Netns, mut command: Command, log: &Path) -> Result<Process> {
    let file = fs::OpenOptions::new().create(true).append(true).open(log)?;
    command.stdout(file.try_clone()?).stderr(file).stdin(Stdio::null());
    let what = format!("start {}", command.get_program().display());
    netns.spawn_command(command).context(what)
}

/// Runs `command` with `input` to its end; a failure is an error with all that it has written.
fn run(netns: &Netns, mut command: Command, input: &str) -> Result<String> {
    let name = command.get_program().display().to_string();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = netns.run(|| {
        let mut child = command.spawn()?;
        let mut pipe = child.stdin.take().context("its standard input")?;
        pipe.write_all(input.as_bytes())?;
        drop(pipe);
        anyhow::Ok(child.wait_with_output()?)
    });
    let output = output.with_context(|| format!("run {name}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
    write!(said, "{stdout}").expect("writing to a string");
    ensure!(output.status.success(), "{name}: {}: {}", output.status, said.trim());
    Ok(stdout)
}
