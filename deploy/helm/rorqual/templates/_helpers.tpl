{{/* Names, labels, and what pods of several kinds have in common. */}}

{{- define "rorqual.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "rorqual.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "rorqual.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "rorqual.selectorLabels" -}}
app.kubernetes.io/name: {{ include "rorqual.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "rorqual.labels" -}}
{{ include "rorqual.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "rorqual.modelLabel" -}}
{{- regexReplaceAll "[^A-Za-z0-9._-]" .Values.model.name "-" | trunc 63 | trimAll "-._" -}}
{{- end -}}

{{/* Image of a family: dict root, family. */}}
{{- define "rorqual.image" -}}
{{- printf "%s:%s-%s" .root.Values.image.repository (default .root.Chart.AppVersion .root.Values.image.tag) .family -}}
{{- end -}}

{{- define "rorqual.podAddress" -}}
{{- if eq .Values.ipFamily "IPv6" -}}[$(POD_IP)]{{- else -}}$(POD_IP){{- end -}}
{{- end -}}

{{/* Where routers listen. A port that is forwarded, and many a sidecar, comes by the pod's loopback. */}}
{{- define "rorqual.routerAddress" -}}
{{- if eq .Values.router.listen "pod" -}}
{{ include "rorqual.podAddress" . }}
{{- else -}}
{{ ternary "[::]" "0.0.0.0" (eq .Values.ipFamily "IPv6") }}
{{- end -}}
{{- end -}}

{{- define "rorqual.modelPath" -}}
{{- default "/model" .Values.model.path -}}
{{- end -}}

{{/* Options by name in camelCase as arguments: dict options. Lists repeat the option; true is an option without value. */}}
{{- define "rorqual.options" -}}
{{- range $name, $value := . }}
{{- $option := printf "--%s" (kebabcase $name) }}
{{- if kindIs "bool" $value }}
{{- if $value }}
- {{ $option | quote }}
{{- end }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "%s=%v" $option . | quote }}
{{- end }}
{{- else if kindIs "float64" $value }}
- {{ printf "%s=%s" $option (toString (ternary (int64 $value) $value (eq (floor $value) $value))) | quote }}
{{- else }}
- {{ printf "%s=%v" $option $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* A discovery text: dict root, component, pool, port. Of all workers, or of one pool. */}}
{{- define "rorqual.source" -}}
{{- $labels := list (printf "app.kubernetes.io/instance=%s" .root.Release.Name) (printf "app.kubernetes.io/component=%s" .component) -}}
{{- if .pool -}}{{- $labels = append $labels (printf "rorqual.io/pool=%s" .pool) -}}{{- end -}}
{{- printf "kubernetes:?selector=%s&port=%s" (join "," $labels) .port -}}
{{- end -}}

{{- define "rorqual.tlsArguments" -}}
{{- if .Values.tls.enabled }}
- --tls-cert=/etc/rorqual/tls/tls.crt
- --tls-key=/etc/rorqual/tls/tls.key
- --tls-ca=/etc/rorqual/tls/ca.crt
- {{ printf "--tls-name=%s" .Values.tls.name | quote }}
{{- end }}
{{- end -}}

{{- define "rorqual.tlsSecret" -}}
{{- default (printf "%s-tls" (include "rorqual.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{- define "rorqual.redisSecret" -}}
{{- default (printf "%s-redis" (include "rorqual.fullname" .)) .Values.redis.existingSecret -}}
{{- end -}}

{{/* Variables of all pods: their address, and the store's URL where there is one. */}}
{{- define "rorqual.env" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: PYTHONUNBUFFERED
  value: "1"
{{- end -}}

{{- define "rorqual.storeEnv" -}}
{{- if .Values.store.existingSecret }}
- name: RORQUAL_STORE
  valueFrom: {secretKeyRef: {name: {{ .Values.store.existingSecret }}, key: {{ .Values.store.key }}}}
{{- else if .Values.redis.enabled }}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "rorqual.redisSecret" . }}, key: password}}
- name: RORQUAL_STORE
  value: redis://:$(REDIS_PASSWORD)@{{ include "rorqual.fullname" . }}-redis:6379
{{- end }}
{{- end -}}

{{- define "rorqual.tlsVolume" -}}
{{- if .Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "rorqual.tlsSecret" . }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "rorqual.tlsMount" -}}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/rorqual/tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* The checkpoint: a volume, its mount, and the container that fetches it. */}}
{{- define "rorqual.hasModelVolume" -}}
{{- if or .Values.model.existingClaim .Values.model.hostPath .Values.model.download.enabled -}}true{{- end -}}
{{- end -}}

{{- define "rorqual.modelVolume" -}}
{{- if include "rorqual.hasModelVolume" . }}
- name: model
  {{- if .Values.model.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.model.existingClaim }}}
  {{- else if .Values.model.hostPath }}
  hostPath: {path: {{ .Values.model.hostPath }}, type: Directory}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.model.download.size }}}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "rorqual.modelMount" -}}
{{- if include "rorqual.hasModelVolume" . }}
- name: model
  mountPath: /model
  readOnly: true
  {{- with .Values.model.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* dict root, router: whether it is one, which reads no weights. */}}
{{- define "rorqual.modelInit" -}}
{{- $root := .root }}
{{- $router := .router }}
{{- with .root.Values.model.download }}
{{- if .enabled }}
{{- if not .image }}{{ fail "model.download.image is needed" }}{{ end }}
{{- if not .command }}{{ fail "model.download.command is needed" }}{{ end }}
initContainers:
  - name: download
    image: {{ .image }}
    command: {{ toJson (ternary (default .command .routerCommand) .command $router) }}
    {{- with .env }}
    env: {{ toJson . }}
    {{- end }}
    {{- with .secretName }}
    envFrom: [{secretRef: {name: {{ . }}}}]
    {{- end }}
    securityContext: {{ toJson $root.Values.containerSecurityContext }}
    resources: {requests: {cpu: "1", memory: 1Gi}, limits: {memory: 4Gi}}
    volumeMounts:
      - name: model
        mountPath: /model
        {{- with $root.Values.model.subPath }}
        subPath: {{ . }}
        {{- end }}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
{{- end -}}

{{/* What all pods have: dict root, account, automount. */}}
{{- define "rorqual.podCommon" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
serviceAccountName: {{ .account }}
automountServiceAccountToken: {{ .automount }}
enableServiceLinks: false
securityContext: {{ toJson .root.Values.podSecurityContext }}
{{- end -}}

{{/* Where pods may run: the map of a component. */}}
{{- define "rorqual.scheduling" -}}
{{- range $name := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with index $ $name }}
{{ $name }}:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Replicas of an object, as text: what the values say, and none for a pool that the autoscaler has. Even the number that
     is there would be wrong: it may change between its rendering and its applying, which Helm 4 then refuses, and who
     applies what `helm template` writes would undo the autoscaler's. One on a dry run has none. dict root, pool. */}}
{{- define "rorqual.replicas" -}}
{{- $auto := dig "autoscaling" dict .pool -}}
{{- if not (and .root.Values.autoscaler.enabled (not .root.Values.autoscaler.dryRun) $auto.enabled) -}}
{{- if hasKey .pool "replicas" }}{{ int .pool.replicas }}{{ else }}1{{ end -}}
{{- end -}}
{{- end -}}

{{/* What of a router's HTTP is for the world, as a list: not its metrics, which need no key. */}}
{{- define "rorqual.publicPaths" -}}
["/v1", "/tokenize", "/health"]
{{- end -}}

{{/* How many pods more, or fewer, a pool may have while it rolls: dict root, pool. */}}
{{- define "rorqual.rollingUpdate" -}}
{{- $roll := mergeOverwrite (deepCopy .root.Values.workers.rollingUpdate) (default dict .pool.rollingUpdate) -}}
{{- if and (eq (int $roll.maxSurge) 0) (eq (int $roll.maxUnavailable) 0) -}}
{{- fail "rollingUpdate: maxSurge and maxUnavailable are both 0: no worker could ever be replaced" -}}
{{- end -}}
{maxSurge: {{ int $roll.maxSurge }}, maxUnavailable: {{ int $roll.maxUnavailable }}}
{{- end -}}
