//! Templates: stored, changed, and applied.

use std::collections::BTreeMap;

use stacyvm_api::{
    CreateRequest, Disk, ErrorCode, Limit, NetworkMode, NetworkRequest, Template, TemplateSecret, TemplateSpawnRequest,
};
use stacyvm_engine::{CreateOptions, EngineError};
use stacyvm_providers::mock::MockOperation;
use stacyvm_sandbox::DiskRequest;

use crate::harness::{Host, caller, create_with, of_owner, run};

fn full() -> Template {
    let pair = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
    Template {
        name: "python".to_owned(),
        image: "python:3.12".to_owned(),
        description: Some("Python and friends".to_owned()),
        provider: Some("mock".to_owned()),
        setup: Some(vec!["echo one > /workspace/log".to_owned(), "echo $MODE >> /workspace/log".to_owned()]),
        allowed_hosts: Some(vec!["10.1.0.0/16".to_owned(), "pypi.org".to_owned()]),
        network: Some(NetworkRequest { mode: NetworkMode::Bridge, allow: vec!["192.168.7.1".to_owned()] }),
        memory_mb: Some(300),
        disk_size_mb: Some(77),
        disk: Some(Disk::Memory),
        pids_limit: Some(55),
        user: Some("1000".to_owned()),
        allow_unenforced: Some(true),
        cpu_cores: Some(0.5),
        ttl_seconds: Some(120),
        env: Some(pair("MODE", "template")),
        metadata: Some(pair("kind", "test")),
        pool_size: Some(3),
        ..Template::default()
    }
}

#[tokio::test]
async fn every_field_comes_back_and_survives_a_restart() {
    let host = Host::new();
    let engine = host.engine().await;
    let made = engine.create_template(&caller(), full()).await.unwrap();
    let expected = Template {
        version: Some(1),
        vcpus: Some(0.5),
        ttl: Some("2m".parse().unwrap()),
        created_at: made.created_at,
        updated_at: made.updated_at,
        ..full()
    };
    assert_eq!(made, expected);
    assert!(made.created_at.is_some());
    let again = engine.create_template(&caller(), full()).await.unwrap_err();
    assert_eq!(again.code(), ErrorCode::Conflict);
    drop(engine);

    let engine = host.engine().await;
    assert_eq!(engine.get_template("python").await.unwrap(), expected);
    let changed = Template { name: "ignored".to_owned(), ttl: Some("3m".parse().unwrap()), ..expected.clone() };
    let updated = engine.update_template(&caller(), "python", changed).await.unwrap();
    assert_eq!((updated.name.as_str(), updated.version, updated.ttl_seconds), ("python", Some(2), Some(180)));
    assert_eq!(updated.created_at, made.created_at);
    let bare = Template { name: "a".to_owned(), image: "b".to_owned(), ..Template::default() };
    let bare = engine.create_template(&caller(), bare).await.unwrap();
    assert_eq!(
        (bare.memory_mb, bare.cpu_cores, bare.ttl_seconds, bare.pool_size),
        (Some(512), Some(1.0), Some(300), Some(0))
    );
    let names: Vec<String> = engine.list_templates().await.unwrap().into_iter().map(|found| found.name).collect();
    assert_eq!(names, ["a", "python"]);
    engine.delete_template(&caller(), "a").await.unwrap();
    assert_eq!(engine.delete_template(&caller(), "a").await.unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(engine.update_template(&caller(), "a", full()).await.unwrap_err().code(), ErrorCode::NotFound);
    for (name, image) in [("", "x"), ("x", ""), ("a b", "x"), ("a/b", "x")] {
        let bad = Template { name: name.to_owned(), image: image.to_owned(), ..Template::default() };
        let refused = engine.create_template(&caller(), bad).await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::BadRequest, "{name:?} {image:?}");
    }
}

#[tokio::test]
async fn every_field_is_applied_at_spawn() {
    let host = Host::new();
    let engine = host.engine().await;
    engine.create_template(&caller(), full()).await.unwrap();
    let spawn = TemplateSpawnRequest {
        metadata: Some(BTreeMap::from([("mine".to_owned(), "too".to_owned())])),
        ..TemplateSpawnRequest::default()
    };
    let owner = of_owner("alice");
    let sandbox = engine.spawn_template(&owner, "python", spawn, CreateOptions::default()).await.unwrap();
    let spec = host.mock.spec(&sandbox.id).unwrap();
    assert_eq!((spec.image.as_str(), spec.memory_mib, spec.vcpus), ("python:3.12", 300, 0.5));
    assert_eq!(spec.disk, DiskRequest { size_mib: Some(77), in_memory: true });
    assert_eq!((spec.pids_limit, spec.user.as_deref(), spec.allow_unenforced), (55, Some("1000"), true));
    assert!(spec.requested.contains(&Limit::Pids));
    assert_eq!(spec.network.allow, ["10.1.0.0/16", "192.168.7.1"]);
    assert_eq!(sandbox.expires_at.since(sandbox.created_at).as_secs(), 120);
    assert_eq!(sandbox.owner_id, owner.owner);
    let metadata: Vec<(&str, &str)> =
        sandbox.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(metadata, [("kind", "test"), ("mine", "too"), ("template", "python")]);
    assert_eq!(run(&engine, &sandbox.id, "cat log; echo $MODE").await.stdout, "one\ntemplate\ntemplate\n");

    // By name on create; what is said explicitly wins.
    let request = CreateRequest {
        template: Some("python".to_owned()),
        image: Some("alpine:latest".to_owned()),
        memory_mb: Some(64),
        env: Some(BTreeMap::from([("MODE".to_owned(), "mine".to_owned())])),
        ..CreateRequest::default()
    };
    let sandbox = create_with(&engine, request).await.unwrap();
    let spec = host.mock.spec(&sandbox.id).unwrap();
    assert_eq!((spec.image.as_str(), spec.memory_mib), ("python:3.12", 64));
    assert_eq!(run(&engine, &sandbox.id, "cat log").await.stdout, "one\nmine\n");
    let unknown =
        engine.spawn_template(&owner, "nope", TemplateSpawnRequest::default(), CreateOptions::default()).await;
    assert_eq!(unknown.unwrap_err().code(), ErrorCode::NotFound);
}

#[tokio::test]
async fn a_setup_that_fails_destroys_the_sandbox_and_says_what_happened() {
    let host = Host::new();
    let engine = host.engine().await;
    let setup = vec!["true".to_owned(), "echo no network >&2; exit 6".to_owned(), "echo never".to_owned()];
    let template = Template { setup: Some(setup), ..full() };
    engine.create_template(&caller(), template).await.unwrap();
    let request = CreateRequest { template: Some("python".to_owned()), ..CreateRequest::default() };
    let error = create_with(&engine, request.clone()).await.unwrap_err();
    assert!(matches!(error, EngineError::SetupFailed { index: 2, .. }), "{error:?}");
    assert_eq!(error.to_string(), "setup command 2 of template `python` exited with 6: no network");
    host.assert_empty().await;

    let secrets = Some(vec![TemplateSecret { name: "TOKEN".to_owned(), inject_at: "env".to_owned() }]);
    engine.update_template(&caller(), "python", Template { secrets, ..full() }).await.unwrap();
    let creates = host.mock.calls(MockOperation::Create).started;
    let error = create_with(&engine, request).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::BadRequest);
    assert!(error.to_string().contains("TOKEN") && error.hint().is_some());
    assert_eq!(host.mock.calls(MockOperation::Create).started, creates);
}
