-- A store written by version 0.1. SQLite and PostgreSQL accept the same statements.
CREATE TABLE vidgen_characters (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(128) NOT NULL,
    name VARCHAR(128) NOT NULL,
    photos TEXT NOT NULL,
    seq BIGINT NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (tenant, name)
);
CREATE TABLE vidgen_idempotency (
    tenant VARCHAR(128) NOT NULL,
    "key" VARCHAR(255) NOT NULL,
    fingerprint VARCHAR(64) NOT NULL,
    jobs TEXT NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (tenant, "key")
);
CREATE TABLE vidgen_jobs (
    id VARCHAR(64) NOT NULL,
    tenant VARCHAR(128) NOT NULL,
    kind VARCHAR(16) NOT NULL,
    state VARCHAR(16) NOT NULL,
    seq BIGINT NOT NULL,
    shot TEXT NOT NULL,
    "key" VARCHAR(64) NOT NULL,
    attempts INTEGER NOT NULL,
    progress INTEGER NOT NULL,
    stage VARCHAR(64),
    step INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    created_at FLOAT NOT NULL,
    started_at FLOAT,
    completed_at FLOAT,
    expires_at FLOAT,
    error TEXT,
    shot_id VARCHAR(128),
    stage_seconds TEXT NOT NULL,
    request TEXT NOT NULL,
    cancel_requested BOOLEAN NOT NULL,
    version BIGINT NOT NULL,
    owner VARCHAR(128),
    lease_until FLOAT,
    deleted_at FLOAT,
    PRIMARY KEY (id),
    UNIQUE (seq)
);
CREATE TABLE vidgen_meta (
    name VARCHAR(64) NOT NULL,
    value BIGINT NOT NULL,
    PRIMARY KEY (name)
);
CREATE TABLE vidgen_outbox (
    id VARCHAR(64) NOT NULL,
    seq BIGINT NOT NULL,
    tenant VARCHAR(128) NOT NULL,
    target VARCHAR(128) NOT NULL,
    event VARCHAR(64) NOT NULL,
    job VARCHAR(64) NOT NULL,
    created_at FLOAT NOT NULL,
    next_try_at FLOAT NOT NULL,
    tries INTEGER NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE vidgen_page_sessions (
    digest VARCHAR(64) NOT NULL,
    key_id VARCHAR(128) NOT NULL,
    expires_at FLOAT NOT NULL,
    PRIMARY KEY (digest)
);
CREATE TABLE vidgen_uploads (
    tenant VARCHAR(128) NOT NULL,
    id VARCHAR(80) NOT NULL,
    file VARCHAR(128) NOT NULL,
    bytes BIGINT NOT NULL,
    created_at FLOAT NOT NULL,
    PRIMARY KEY (tenant, id)
);
CREATE INDEX vidgen_jobs_by_tenant ON vidgen_jobs (tenant, seq);
CREATE INDEX vidgen_jobs_by_state ON vidgen_jobs (state, seq);
CREATE INDEX vidgen_jobs_by_shot_id ON vidgen_jobs (shot_id);
CREATE INDEX vidgen_jobs_by_version ON vidgen_jobs (version);
CREATE INDEX vidgen_outbox_by_time ON vidgen_outbox (next_try_at);
INSERT INTO vidgen_characters VALUES ('char_1', 'ada', 'Grace', '["file-1"]', 3, 1795667755.66350722);
INSERT INTO vidgen_idempotency VALUES ('ada', 'x', 'f', '["video_1"]', 1795667755.65193748);
INSERT INTO vidgen_jobs VALUES (
    'video_1', 'ada', 'video', 'queued', 2,
    '{"id":"online-1","prompt":"a man «ünter» 🌧","negative_prompt":null,"mode":"quality","seed":7,"variants":1,"width":1024,"height":576,"image":null,"face_image":[],"face_index":null,"character":null,"identity":"infusenet","identity_strength":1.0,"identity_start":0.0,"identity_end":1.0,"pose":"photo","refine_strength":0.35,"min_identity":null,"retries":0,"lora":[{"path":"builtin:ink","weight":0.8}],"lora_strength":0.6,"use_hunyuan_style":false,"style_prompt":null,"style_strength":0.5,"generate_video":true,"num_frames":25,"fps":5,"motion_bucket_id":127,"noise_aug_strength":0.02,"upscale_video":true,"scale":4,"upscaler":"animevideov3","steps":{"flux":null,"refine":null,"lora":null,"hunyuan":null,"svd":null},"guidance":{"flux":null,"refine":null,"lora":null,"hunyuan":null,"svd":null},"metadata":{"a":[1,null]}}',
    'kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk', 0, 0, NULL, 0, 0, 5.25, NULL, NULL, NULL, NULL, NULL,
    '{}', '{"model":"tiny"}', false, 2, NULL, NULL, NULL
);
INSERT INTO vidgen_meta VALUES ('schema', 1);
INSERT INTO vidgen_meta VALUES ('changes', 4);
INSERT INTO vidgen_uploads VALUES ('ada', 'file-1', 'ab', 5, 1795667755.66700649);
