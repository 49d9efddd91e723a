{{/* The pod of a worker: dict root, pool, values, name, nodes. */}}

{{- define "rorqual.poolLabels" -}}
app.kubernetes.io/component: worker
rorqual.io/pool: {{ .pool | quote }}
rorqual.io/role: {{ .values.role }}
rorqual.io/model: {{ include "rorqual.modelLabel" .root | quote }}
{{- end -}}

{{- define "rorqual.workerPod" -}}
{{- $root := .root }}
{{- $values := .values }}
{{- $workers := $root.Values.workers }}
{{- $address := include "rorqual.podAddress" $root }}
{{- $security := deepCopy $root.Values.containerSecurityContext }}
{{- $resources := deepCopy (default (dict "requests" (dict "cpu" "4" "memory" "32Gi") "limits" (dict "memory" "64Gi")) $values.resources) }}
{{- if $values.rdma }}
{{- if eq (toString (default dict $root.Values.podSecurityContext).runAsUser) "0" }}
{{- /* Root alone has what is added here: nothing is handed on to other users. */}}
{{- $_ := set $security "capabilities" (mergeOverwrite (dict) (default (dict) $security.capabilities) (dict "add" (list "IPC_LOCK"))) }}
{{- end }}
{{- $count := toString (default 1 $values.rdma.count) }}
{{- $_ := set $resources "limits" (merge (dict $values.rdma.resource $count) (default (dict) $resources.limits)) }}
{{- $_ := set $resources "requests" (merge (dict $values.rdma.resource $count) (default (dict) $resources.requests)) }}
{{- end }}
{{- $domain := dig "computeDomain" "enabled" false $values }}
{{- if $domain }}
{{- $_ := set $resources "claims" (list (dict "name" "imex-channel")) }}
{{- end }}
metadata:
  labels:
    {{- include "rorqual.labels" $root | nindent 4 }}
    {{- include "rorqual.poolLabels" . | nindent 4 }}
  {{- $annotations := merge (dict) (default (dict) $values.podAnnotations) $workers.podAnnotations }}
  {{- with $annotations }}
  annotations: {{ toJson . }}
  {{- end }}
spec:
  {{- include "rorqual.podCommon" (dict "root" $root "account" (printf "%s-worker" (include "rorqual.fullname" $root)) "automount" false) | nindent 2 }}
  {{- include "rorqual.scheduling" $values | nindent 2 }}
  {{- if and $domain (not $values.affinity) }}
  affinity:
    # Trays of one NVLink domain, for all workers of this release: state is read over NVLink there.
    podAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: nvidia.com/gpu.clique
            labelSelector:
              matchLabels:
                {{- include "rorqual.selectorLabels" $root | nindent 16 }}
                app.kubernetes.io/component: worker
  {{- end }}
  {{- range $key := list "runtimeClassName" "schedulerName" "priorityClassName" }}
  {{- with index $values $key }}
  {{ $key }}: {{ . }}
  {{- end }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add $workers.drainSeconds $workers.preStopSeconds 30 }}
  {{- if $domain }}
  resourceClaims:
    - {name: imex-channel, resourceClaimTemplateName: {{ include "rorqual.fullname" $root }}-channel}
  {{- end }}
  {{- include "rorqual.modelInit" (dict "root" $root "router" false) | nindent 2 }}
  containers:
    - name: worker
      image: {{ include "rorqual.image" (dict "root" $root "family" $values.family) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [rorqual, {{ ternary "worker" $values.role (eq $values.role "both") }}]
      args:
        - --model={{ include "rorqual.modelPath" $root }}
        - --listen={{ $address }}:9000
        - --metrics-port=9090
        - --worker-id=$(POD_NAME)
        - --drain-seconds={{ $workers.drainSeconds }}
        {{- if gt .nodes 1 }}
        - --nodes={{ .nodes }}
        - --node=$(LWS_WORKER_INDEX)
        - --leader=$(LWS_LEADER_ADDRESS)
        {{- end }}
        {{- include "rorqual.tlsArguments" $root | nindent 8 }}
        {{- include "rorqual.options" (mergeOverwrite (deepCopy $workers.options) (default (dict) $values.options)) | nindent 8 }}
      env:
        {{- include "rorqual.env" $root | nindent 8 }}
        {{- include "rorqual.storeEnv" $root | nindent 8 }}
        - {name: TRITON_CACHE_DIR, value: /var/cache/rorqual/triton}
        - {name: NUMBA_CACHE_DIR, value: /var/cache/rorqual/numba}
        - {name: CUDA_CACHE_PATH, value: /var/cache/rorqual/cuda}
        {{- if gt .nodes 1 }}
        - name: LWS_WORKER_INDEX
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"}}
        {{- end }}
        {{- with $workers.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: session, containerPort: 9000}
        - {name: metrics, containerPort: 9090}
      startupProbe:
        httpGet: {path: /ready, port: metrics}
        periodSeconds: 5
        timeoutSeconds: 3
        failureThreshold: {{ max 1 (div $workers.startSecondsMax 5) }}
      readinessProbe:
        httpGet: {path: /ready, port: metrics}
        periodSeconds: 3
        timeoutSeconds: 3
      livenessProbe:
        httpGet: {path: /health, port: metrics}
        periodSeconds: 30
        timeoutSeconds: 10
        failureThreshold: 10
      lifecycle:
        preStop: {exec: {command: [sleep, {{ $workers.preStopSeconds | quote }}]}}
      securityContext: {{ toJson $security }}
      resources: {{ toJson $resources }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: jit-cache, mountPath: /var/cache/rorqual}
        {{- include "rorqual.modelMount" $root | nindent 8 }}
        {{- include "rorqual.tlsMount" $root | nindent 8 }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: 4Gi}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $workers.shmSize }}}}
    - name: jit-cache
      {{- if $workers.jitCache.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $workers.jitCache.existingClaim }}}
      {{- else if $workers.jitCache.hostPath }}
      hostPath: {path: {{ $workers.jitCache.hostPath }}, type: Directory}
      {{- else }}
      emptyDir: {sizeLimit: {{ $workers.jitCache.size }}}
      {{- end }}
    {{- include "rorqual.modelVolume" $root | nindent 4 }}
    {{- include "rorqual.tlsVolume" $root | nindent 4 }}
{{- end -}}
